"""Updates of embeddings and convolutions as differentiable operations of torch's, whose backward pass adds
up their importance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import compiled_torch_ops, updates
from .autocast import without_autocast
from .ops import Probe, asked_of


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
        a, b, e: As in :func:`increlora_rs.ops.adapter`, A (rows, number of embeddings).
        scale: The scale s.
        padding_idx, scale_grad_by_freq: As in ``torch.nn.functional.embedding``, for A.
        probe, slot: As in :func:`increlora_rs.ops.adapter`.

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
    return _observed(update, updates.embedding_importance, float(scale), probe, slot, ids, a, b, e)


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
        a, b, e: As in :func:`increlora_rs.ops.adapter`, A (rows, C times kernel size).
        base: An ``nn.Conv1d``, ``Conv2d`` or ``Conv3d`` of one group.
        scale: The scale s.
        dropout: Probability with which an element of x is dropped.
        probe, slot: As in :func:`increlora_rs.ops.adapter`.

    Returns:
        Tensor of the shape of the output of ``base`` and the dtype of x, under autocast of autocast's.
    """
    if dropout > 0.0:
        x = functional.dropout(x, dropout)
    geometry, x = updates.geometry_of(base, x)
    if torch.compiler.is_compiling():
        asked = asked_of(probe, slot)
        return compiled_torch_ops.convolution(x, a, b, e, geometry=geometry, scale=scale, **asked)
    update = updates.convolution(x, a, b, e, float(scale), geometry)
    importance = functools.partial(updates.convolution_importance, geometry)
    return _observed(update, importance, float(scale), probe, slot, x, a, b, e)


def _observed(
    update: Tensor,
    importance: Callable[..., Tensor],
    scale: float,
    probe: Probe | None,
    slot: int,
    *tensors: Tensor,
) -> Tensor:
    """``update`` itself, whose backward pass adds ``importance(gradient, scale, *tensors)`` to the probe's
    slot where the probe asks for it."""
    if probe is None:
        return update
    observed: Tensor = _Observed.apply(update, importance, scale, probe, slot, *tensors)
    return observed


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        update: Tensor,
        importance: Callable[..., Tensor],
        scale: float,
        probe: Probe,
        slot: int,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.importance, ctx.scale, ctx.probe, ctx.slot = importance, scale, probe, slot
        ctx.save_for_backward(*tensors)
        return update.view_as(update)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        ctx.probe.count_backward(ctx.slot)
        if ctx.probe.importance is not None:
            with without_autocast(gy.device.type):
                ctx.probe.importance[ctx.slot] += ctx.importance(gy, ctx.scale, *tensors)
        return gy, None, None, None, None, *[None] * len(tensors)
