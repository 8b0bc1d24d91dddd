"""A low-rank update of a linear layer as a differentiable operation, ``y + s B (E * (A drop(x)))`` (arXiv
2308.12043, eq. 3): dtype and autocast decided here, the work in Rust, or in torch where Rust may not read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import _core
from ..gauges import Gauge
from . import linear_graph as in_graph
from .autocast import as_autocast, compute_dtype, without_autocast
from .device import stream
from .modes import readable
from .observed import observed
from .probe import Probe, for_graph
from .scaled import scaled_b


def add_low_rank(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    *,
    scale: float | Tensor,
    dropout: float = 0.0,
    inplace: bool = False,
    probe: Probe | None = None,
    slot: int = 0,
) -> Tensor:
    """``y + scale * B (E * (A drop(x)))``, differentiable once (arXiv 2308.12043, eq. 3).

    The product is computed in the dtype of ``x``, under autocast in autocast's; gradients come in
    the dtype of their tensors.

    Args:
        y: Output of the base layer, (..., out).
        x: Its input, (..., in), any number of leading dimensions, empty ones included.
        a: Right vectors, (rows, in).
        b: Left vectors, (out, rows).
        e: Singular values of the active components, (active, 1); further rows of A and B are in
            reserve and count with ``RESERVE_E``.
        scale: The scale s; while torch.compile traces also float64 (1) that holds it.
        dropout: Probability with which an element of x is dropped.
        inplace: May y be overwritten?
        probe: Has the backward pass add to its gauge, in slot ``slot``, where it is armed.

    Returns:
        Tensor of the shape and dtype of y.

    Raises:
        ValueError: shapes or devices do not fit, or a number is out of range.
        TypeError: a dtype does not fit.
    """
    if not x.dim() or x.shape[-1] != a.shape[-1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its last dimension must be {a.shape[-1]}, the in_features "
            "of the adapted layer"
        )
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"y has shape {tuple(y.shape)} and x {tuple(x.shape)}; all dimensions but the last must agree"
        )
    if torch.compiler.is_compiling():
        x = as_autocast(x)
        return in_graph.add_low_rank(y, x, a, b, e, scale, dropout, for_graph(probe, slot))
    result: Tensor = _AddLowRank.apply(y, x, a, b, e, scale, dropout, inplace, probe, slot)
    return result


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    *,
    scale: float | Tensor,
    dropout: float = 0.0,
    probe: Probe | None = None,
    slot: int = 0,
) -> Tensor:
    """A frozen linear layer and its update in one operation: ``x W^T + bias + scale * B (E * (A drop(x)))``.

    As :func:`add_low_rank` after ``torch.nn.functional.linear``, with fewer passes over the large matrices:
    the update is written first and the product added to it, forward and backward alike. Only for
    :func:`fits_linear`.

    Args:
        x: Input, (..., in).
        weight: (out, in), without a gradient. bias: (out) or None, without a gradient.
        a, b, e, scale, dropout, probe, slot: As in :func:`add_low_rank`.

    Returns:
        Tensor (..., out) of the dtype of x, under autocast of autocast's.

    Raises:
        ValueError: shapes or devices do not fit, or a number is out of range.
        TypeError: a dtype does not fit.
    """
    x, weight = as_autocast(x), as_autocast(weight)
    bias = None if bias is None else as_autocast(bias)
    if torch.compiler.is_compiling():
        asked = for_graph(probe, slot)
        return in_graph.low_rank_linear(x, weight, bias, a, b, e, scale, dropout, asked)
    result: Tensor = _LowRankLinear.apply(x, weight, bias, a, b, e, scale, dropout, probe, slot)
    return result


def add_by_torch(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    *,
    scale: float | Tensor,
    dropout: float = 0.0,
    probe: Probe | None = None,
    slot: int = 0,
) -> Tensor:
    """:func:`add_low_rank` for tensors of any kind, which torch's own operations know: fake, nested, sharded,
    of the meta device, or seen by a mode or a transform."""
    dtype, seen = compute_dtype(x), x
    x = functional.dropout(x, dropout) if dropout > 0.0 else x
    t = functional.linear(x.to(dtype), a.to(dtype))
    update = functional.linear(t, scaled_b(a, b, e, scale).to(dtype))

    def show(gauge: Gauge, slot: int, gy: Tensor, x: Tensor, a: Tensor, b: Tensor, e: Tensor) -> None:
        gy, shown = _flat(gy), _flat(x if gauge.fused else seen).to(dtype)
        if gauge.fused:
            gauge.total[slot] += _core.importance(gy, shown, a, b, e, float(scale), stream(x.device))
        else:
            gauge.add(slot, gy, shown)

    update = observed(update, show, probe, slot, x, a, b, e)
    return (y + update).to(y.dtype)


def show_gradient(gauge: Gauge, slot: int, gy: Tensor, x: Tensor) -> None:
    """Has the gauge add the gradient of the weight, for an update without components."""
    gauge.add(slot, _flat(gy), _flat(x))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def fits_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False) -> bool:
    """Can :func:`low_rank_linear` stand for the base layer: frozen, of one dtype with x, maybe by autocast?

    ``transposed``: ``weight`` is (in, out), to be handed over as its transpose.
    """
    return (
        # Subclasses (quantised, sharded) keep their numbers where Rust does not look.
        (readable(x, weight) if bias is None else readable(x, weight, bias))
        and x.dim() > 0
        and x.shape[-1] == weight.shape[0 if transposed else 1]
        and x.device == weight.device
        and _fits(x, weight)
        and (bias is None or _fits(x, bias))
    )


def _fits(x: Tensor, frozen: Tensor) -> bool:
    return not frozen.requires_grad and (frozen.dtype == x.dtype or compute_dtype(frozen) == compute_dtype(x))


def new_seed(dropout: float) -> int:
    """The seed of a dropout mask; 0 where nothing is dropped."""
    # From torch's generator, so that manual_seed and a checkpoint's replay hold.
    return int(torch.randint(2**63 - 1, ())) if dropout > 0.0 else 0


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        e: Tensor,
        scale: float,
        dropout: float,
        inplace: bool,
        probe: Probe | None,
        slot: int,
    ) -> Tensor:
        ctx.dtype = compute_dtype(x)
        flat = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        if inplace and y.is_contiguous():
            ctx.mark_dirty(y)
            result = y
        else:
            result = y.clone(memory_format=torch.contiguous_format)
        ctx.seed = new_seed(dropout)
        with without_autocast(x.device.type):
            t, mask = _core.adapter_forward(
                result.view(-1, y.shape[-1]), flat, a, b, e, scale, dropout, ctx.seed, stream(x.device)
            )
        ctx.save_for_backward(x, t, mask, a, b, e, None)
        ctx.scale, ctx.dropout, ctx.probe, ctx.slot = scale, dropout, probe, slot
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        return gy, *_backward(ctx, gy, ctx.needs_input_grad[1]), None, None, None, None, None


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        e: Tensor,
        scale: float,
        dropout: float,
        probe: Probe | None,
        slot: int,
    ) -> Tensor:
        ctx.dtype = x.dtype
        ctx.seed = new_seed(dropout)
        with without_autocast(x.device.type):
            y, t, mask = _core.linear_forward(
                x, weight, bias, a, b, e, scale, dropout, ctx.seed, stream(x.device)
            )
        ctx.save_for_backward(x, t, mask, a, b, e, weight)
        ctx.scale, ctx.dropout, ctx.probe, ctx.slot = scale, dropout, probe, slot
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        gx, ga, gb, ge = _backward(ctx, gy, ctx.needs_input_grad[0])
        return gx, None, None, ga, gb, ge, None, None, None, None


def _backward(ctx: Any, gy: Tensor, needs_x: bool) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    x, t, mask, a, b, e, weight = ctx.saved_tensors
    probe, slot, gauge = ctx.probe, ctx.slot, None
    if probe is not None:
        probe.count_backward(slot)
        gauge = probe.gauge if probe.armed else None
    flat_gy, flat = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1]).to(ctx.dtype)
    with without_autocast(x.device.type):
        if gauge is not None and not gauge.fused:
            # Before dropout: the gradient of the weight itself, and without the mask's noise.
            gauge.add(slot, flat_gy, flat)
        gx, ga, gb, ge = _core.adapter_backward(
            flat_gy,
            flat,
            t,
            a,
            b,
            e,
            ctx.scale,
            mask,
            ctx.dropout,
            needs_x,
            gauge.total if gauge is not None and gauge.fused else None,
            slot,
            ctx.seed,
            weight,
            stream(x.device),
        )
    if gx is not None:
        gx = gx.view(x.shape).to(x.dtype)
    return gx, ga, gb, ge
