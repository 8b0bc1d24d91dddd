"""Updates of matrices that stand in one parameter, as the experts of a mixture do: ``W_e + P_e A_e`` for all
e in one product, by torch's operations; the backward pass shows the gradient of each matrix to the gauge."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..gauges.sensitivity import of_gradient
from .autocast import without_autocast
from .modes import in_memory, transformed
from .probe import Probe
from .scaled import scaled_b
from .update import LowRank


def add_stacked(weight: Tensor, updates: Sequence[LowRank], *, transposed: bool) -> Tensor:
    """``weight`` with the update of each of its matrices in it, differentiable by all their factors: a matrix
    that no token came to has gradients of 0.

    Args:
        weight: (E, out, in), where ``transposed`` (E, in, out); or one matrix (out, in).
        updates: One a matrix, of any ranks.
        transposed: Do the matrices stand as (in, out)?

    Returns:
        A tensor like ``weight``, computed in its dtype.
    """
    a, p = _padded([update.a for update in updates]), _padded(_scaled_rows(updates))
    a, p = a.to(weight.dtype), p.to(weight.dtype)
    left, right = (a, p) if transposed else (p, a)
    matrices = weight if weight.dim() == 3 else weight.unsqueeze(0)
    with without_autocast(weight.device.type):
        return torch.baddbmm(matrices, left.transpose(1, 2), right).view_as(weight)


def shown(
    weight: Tensor, updates: Sequence[LowRank], probe: Probe, slots: Sequence[int], *, transposed: bool
) -> Tensor:
    """``weight``, of :func:`add_stacked`, itself; its backward pass the probe counts, and has the gauge add,
    where it is armed, the gradient of each matrix in its slot."""
    if not weight.requires_grad or transformed() or not in_memory(weight):
        return weight
    result: Tensor = _Shown.apply(weight, updates, probe, slots, transposed)
    return result


def _scaled_rows(updates: Sequence[LowRank]) -> list[Tensor]:
    """P^T (rows, out) of each."""
    first = updates[0].scale
    if any(update.scale != first or len(update.a) != len(update.e) for update in updates):
        return [scaled_b(one.a, one.b, one.e, one.scale).t() for one in updates]
    # One product for all of them.
    rows = torch.cat([one.b.t() for one in updates]) * (torch.cat([one.e for one in updates]) * first)
    return list(rows.split([len(one.e) for one in updates]))


def _padded(matrices: Sequence[Tensor]) -> Tensor:
    """(E, most, columns) of E matrices of up to ``most`` rows, rows of 0 below the shorter ones."""
    rows = tuple(len(matrix) for matrix in matrices)
    together = torch.cat(list(matrices))
    if len(set(rows)) > 1:
        together = nn.functional.pad(together, (0, 0, 0, 1))[_places(rows, together.device)]
    return together.view(len(rows), max(rows), together.shape[1])


@functools.lru_cache(maxsize=1024)
def _places(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each row of :func:`_padded` stands among all; the last one is of 0."""
    most, total = max(rows), sum(rows)
    places, start = [], 0
    for count in rows:
        places += [*range(start, start + count), *[total] * (most - count)]
        start += count
    return torch.tensor(places, device=device)


class _Shown(Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        updates: Sequence[LowRank],
        probe: Probe,
        slots: Sequence[int],
        transposed: bool,
    ) -> Tensor:
        # Of leaves that live as long as the layers: there is nothing to save.
        ctx.updates, ctx.probe, ctx.slots, ctx.transposed = updates, probe, slots, transposed
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gw: Tensor) -> tuple[Tensor | None, ...]:
        probe = ctx.probe
        probe.count_backward(min(ctx.slots))
        if probe.armed:
            with without_autocast(gw.device.type):
                _show(ctx, gw if gw.dim() == 3 else gw.unsqueeze(0))
        return gw, None, None, None, None


def _show(ctx: Any, gradients: Tensor) -> None:
    gauge = ctx.probe.gauge
    for gradient, update, slot in zip(gradients, ctx.updates, ctx.slots, strict=True):
        matrix = gradient.t() if ctx.transposed else gradient
        if gauge.fused:
            p = scaled_b(update.a, update.b, update.e, update.scale)
            gauge.total[slot] += of_gradient(matrix, update.a, p)
        else:
            gauge.add_gradient(slot, matrix)
