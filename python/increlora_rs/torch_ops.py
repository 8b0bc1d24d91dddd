"""Updates of embeddings and convolutions as torch's own operations, and their importance
``sum |dW * dLoss/d(dW)|``, which the backward pass adds up."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from ._core import RESERVE_E
from .autocast import without_autocast
from .ops import Probe
from .sketch import Sketch

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_WEIGHT_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


# A graph would take the rank for fixed, and miss the importance: compiled models leave it here.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def embedding(
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    *,
    scale: float,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    probe: Probe | None = None,
    slot: int = 0,
) -> Tensor:
    """``scale * B (E * A[:, id])`` for each id: what the update adds to an embedding.

    Args:
        ids: Integers, any shape.
        a, b, e: As in :func:`increlora_rs.ops.adapter`, A (rows, number of embeddings).
        scale: The scale s.
        padding_idx, scale_grad_by_freq: As in ``torch.nn.functional.embedding``, for A.
        probe, slot: As in :func:`increlora_rs.ops.adapter`.

    Returns:
        Tensor (*ids, out) of the dtype of the parameters, under autocast of autocast's.
    """
    t = functional.embedding(ids, a.t(), padding_idx=padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    update = t @ _scaled_b(a, b, e, scale).t()
    sketched = functools.partial(_add_embedding, padding_idx, scale_grad_by_freq)
    return _observed(update, (_embedding_importance, sketched), scale, probe, slot, ids, a, b, e)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def convolution(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    *,
    base: Any,
    scale: float,
    dropout: float = 0.0,
    probe: Probe | None = None,
    slot: int = 0,
) -> Tensor:
    """``scale * B (E * (A drop(x)))`` with the convolution A, like ``base``, and B, of kernel size 1.

    Args:
        x: Input of ``base``, (N, C, ...) or (C, ...).
        a, b, e: As in :func:`increlora_rs.ops.adapter`, A (rows, C times kernel size).
        base: An ``nn.Conv1d``, ``Conv2d`` or ``Conv3d`` of one group.
        scale: The scale s.
        dropout: Probability with which an element of x is dropped.
        probe, slot: As in :func:`increlora_rs.ops.adapter`.

    Returns:
        Tensor of the shape of the output of ``base`` and the dtype of x, under autocast of autocast's.
    """
    seen = x
    if dropout > 0.0:
        x = functional.dropout(x, dropout)
        # A sketch is of the gradient of the weight itself, which has no dropout before it.
        seen = seen if probe is not None and probe.sketches is not None else x
    dims = len(base.kernel_size)
    kernel = a.to(x.dtype).view(-1, *base.weight.shape[1:])
    mix = _scaled_b(a, b, e, scale).to(x.dtype).view(*b.shape, *[1] * dims)
    update = _CONVOLUTIONS[dims](base._conv_forward(x, kernel, None), mix)
    observers = functools.partial(_convolution_importance, base), functools.partial(_add_convolution, base)
    return _observed(update, observers, scale, probe, slot, seen, a, b, e)


def _scaled_b(a: Tensor, b: Tensor, e: Tensor, scale: float) -> Tensor:
    """``P = s B diag(E)``, so that dW = P A: (out, rows); the reserve's E is a constant."""
    reserve = a.shape[0] - e.shape[0]
    e = e.view(-1)
    if reserve:
        e = torch.cat([e, e.new_full((reserve,), RESERVE_E)])
    return b * (e * scale)


def _embedding_importance(gy: Tensor, scale: float, ids: Tensor, a: Tensor, b: Tensor, e: Tensor) -> Tensor:
    # Rows of dW that no id asks for have no gradient. Those that are asked for, each once: ids in order,
    # numbered without counting them, for which a GPU would have to be waited for.
    in_order, order = ids.flatten().sort()
    number = torch.zeros_like(in_order)
    number[1:] = (in_order[1:] != in_order[:-1]).cumsum(0)
    asked_for = torch.zeros_like(in_order).scatter_(0, number, in_order)
    wide = torch.promote_types(gy.dtype, torch.float32)
    flat = gy.reshape(-1, gy.shape[-1]).to(wide)
    gradient = torch.zeros_like(flat).index_add_(0, number, flat[order])
    delta = a[:, asked_for].t() @ _scaled_b(a, b, e, scale).t()
    return (delta * gradient).abs().sum(dtype=torch.float64)


def _convolution_importance(
    base: Any, gy: Tensor, scale: float, x: Tensor, a: Tensor, b: Tensor, e: Tensor
) -> Tensor:
    gradient = _weight_gradient(base, gy, x)
    delta = _scaled_b(a, b, e, scale) @ a
    return (delta.view_as(gradient) * gradient).abs().sum(dtype=torch.float64)


def _weight_gradient(base: Any, gy: Tensor, x: Tensor) -> Tensor:
    """The gradient of the weight of the convolution ``base``, in its shape."""
    dims = len(base.kernel_size)
    if x.dim() == dims + 1:
        x, gy = x.unsqueeze(0), gy.unsqueeze(0)
    padding = base.padding
    if base.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        x, padding = functional.pad(x, base._reversed_padding_repeated_twice, mode=mode), 0
    gradient: Tensor = _WEIGHT_GRADIENTS[dims](
        x.to(gy.dtype), base.weight.shape, gy, base.stride, padding, base.dilation
    )
    return gradient


def _add_convolution(base: Any, sketch: Sketch, gy: Tensor, x: Tensor) -> None:
    sketch.add_matrix(_weight_gradient(base, gy, x).flatten(1))


def _add_embedding(
    padding_idx: int | None, scale_grad_by_freq: bool, sketch: Sketch, gy: Tensor, ids: Tensor
) -> None:
    ids, gy = ids.flatten(), gy.reshape(-1, gy.shape[-1])
    if scale_grad_by_freq:
        counts = torch.zeros_like(sketch.omega[0]).index_add_(0, ids, sketch.omega.new_ones(len(ids)))
        gy = gy / counts[ids, None]
    if padding_idx is not None:
        gy = gy.masked_fill((ids == padding_idx)[:, None], 0.0)
    sketch.add_lookup(gy, ids)


def _observed(
    update: Tensor,
    observers: tuple[Callable[..., Tensor], Callable[..., None]],
    scale: float,
    probe: Probe | None,
    slot: int,
    *tensors: Tensor,
) -> Tensor:
    """``update`` itself, whose backward pass shows its gradient to one of the observers where the probe asks
    for it: ``importance(gradient, scale, *tensors)`` is added to the probe's slot, ``sketched(sketch,
    gradient, tensors[0])`` adds to the module's sketch."""
    if probe is None:
        return update
    observed: Tensor = _Observed.apply(update, observers, scale, probe, slot, *tensors)
    return observed


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        update: Tensor,
        observers: tuple[Callable[..., Tensor], Callable[..., None]],
        scale: float,
        probe: Probe,
        slot: int,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.observers, ctx.scale, ctx.probe, ctx.slot = observers, scale, probe, slot
        ctx.save_for_backward(*tensors)
        return update.view_as(update)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        ctx.probe.count_backward(ctx.slot)
        importance, sketched = ctx.observers
        sketch = ctx.probe.sketch(ctx.slot)
        with without_autocast(gy.device.type):
            if ctx.probe.importance is not None:
                ctx.probe.importance[ctx.slot] += importance(gy, ctx.scale, *tensors)
            if sketch is not None:
                sketched(sketch, gy, tensors[0])
        return gy, None, None, None, None, *[None] * len(tensors)
