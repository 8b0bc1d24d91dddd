"""Updates as differentiable operations of torch's, whose backward pass adds up their importance: those of
embeddings and convolutions, and that of a linear layer where Rust may not read its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import _core
from ..gauges.sketch import Sketch
from . import torch_ops_graph as compiled_torch_ops
from . import updates
from .autocast import compute_dtype, without_autocast
from .device import stream
from .modes import in_memory, transformed
from .probe import Probe, asked_of

_Observers = tuple[Callable[..., Tensor], Callable[..., None]]


def linear(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
    probe: Probe | None = None,
    slot: int = 0,
) -> Tensor:
    """:func:`increlora_rs.ops.linear.adapter` for tensors of any kind, which torch's own operations know:
    fake, nested, sharded, of the meta device, or seen by a mode or a transform."""
    dtype, seen = compute_dtype(x), x
    x = functional.dropout(x, dropout) if dropout > 0.0 else x
    t = functional.linear(x.to(dtype), a.to(dtype))
    update = functional.linear(t, updates.scaled_b(a, b, e, scale).to(dtype))

    def importance(gy: Tensor, scale: float, x: Tensor, a: Tensor, b: Tensor, e: Tensor) -> Tensor:
        return _core.importance(_flat(gy), _flat(x).to(dtype), a, b, e, scale, stream(x.device))

    def sketched(sketch: Sketch, gy: Tensor, _: Tensor) -> None:
        sketch.add(_flat(gy), _flat(seen).to(dtype))

    update = _observed(update, (importance, sketched), scale, probe, slot, x, a, b, e)
    return (y + update).to(y.dtype)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def embedding(
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    *,
    scale: float | Tensor,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    probe: Probe | None = None,
    slot: int = 0,
) -> Tensor:
    """``scale * B (E * A[:, id])`` for each id: what the update adds to an embedding.

    Args:
        ids: Integers, any shape.
        a, b, e: As in :func:`increlora_rs.ops.linear.adapter`, A (rows, number of embeddings).
        scale: The scale s.
        padding_idx, scale_grad_by_freq: As in ``torch.nn.functional.embedding``, for A.
        probe, slot: As in :func:`increlora_rs.ops.linear.adapter`.

    Returns:
        Tensor (*ids, out) of the dtype of the parameters, under autocast of autocast's.
    """
    if torch.compiler.is_compiling():
        return compiled_torch_ops.embedding(
            ids,
            a,
            b,
            e,
            scale=scale,
            padding_idx=padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
            **asked_of(probe, slot),
        )
    update = updates.embedding(ids, a, b, e, float(scale), padding_idx, scale_grad_by_freq)

    def sketched(sketch: Sketch, gy: Tensor, ids: Tensor) -> None:
        updates.embedding_sketch(sketch, gy, ids, padding_idx, scale_grad_by_freq)

    observers = updates.embedding_importance, sketched
    return _observed(update, observers, float(scale), probe, slot, ids, a, b, e)


def convolution(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    *,
    base: Any,
    scale: float | Tensor,
    dropout: float = 0.0,
    probe: Probe | None = None,
    slot: int = 0,
) -> Tensor:
    """``scale * B (E * (A drop(x)))`` with the convolution A, like ``base``, and B, of kernel size 1.

    Args:
        x: Input of ``base``, (N, C, ...) or (C, ...).
        a, b, e: As in :func:`increlora_rs.ops.linear.adapter`, A (rows, C times kernel size).
        base: An ``nn.Conv1d``, ``Conv2d`` or ``Conv3d`` of one group.
        scale: The scale s.
        dropout: Probability with which an element of x is dropped.
        probe, slot: As in :func:`increlora_rs.ops.linear.adapter`.

    Returns:
        Tensor of the shape of the output of ``base`` and the dtype of x, under autocast of autocast's.
    """
    seen = None
    if dropout > 0.0:
        if probe is not None and probe.sketches is not None:
            # A sketch is of the gradient of the weight itself, which has no dropout before it.
            seen = updates.geometry_of(base, x)[1]
        x = functional.dropout(x, dropout)
    geometry, x = updates.geometry_of(base, x)
    if torch.compiler.is_compiling():
        asked = asked_of(probe, slot)
        return compiled_torch_ops.convolution(x, seen, a, b, e, geometry=geometry, scale=scale, **asked)
    update = updates.convolution(x, a, b, e, float(scale), geometry)

    def sketched(sketch: Sketch, gy: Tensor, x: Tensor) -> None:
        sketch.add_matrix(updates.convolution_weight_gradient(geometry, gy, x))

    observers = functools.partial(updates.convolution_importance, geometry), sketched
    return _observed(update, observers, float(scale), probe, slot, x if seen is None else seen, a, b, e)


def _observed(
    update: Tensor,
    observers: _Observers,
    scale: float,
    probe: Probe | None,
    slot: int,
    *tensors: Tensor,
) -> Tensor:
    """``update`` itself, whose backward pass shows its gradient to one of the observers where the probe asks
    for it: ``importance(gradient, scale, *tensors)`` is added to the probe's slot, ``sketched(sketch,
    gradient, tensors[0])`` adds to the module's sketch."""
    # Nobody trains by a scheduler what is no number yet, or what a transform makes of it.
    if probe is None or transformed() or not in_memory(update):
        return update
    observed: Tensor = _Observed.apply(update, observers, scale, probe, slot, *tensors)
    return observed


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        update: Tensor,
        observers: _Observers,
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
