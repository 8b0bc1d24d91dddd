"""The updates of embeddings and convolutions inside torch.compile and torch.export: operations that stand
in a graph as they are, as those of :mod:`increlora_rs.compiled` do for linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import updates
from .autocast import without_autocast
from .updates import Geometry

_ASKED = "Tensor? factor, Tensor? collector, Tensor? armed, float scale"
_LOOKUP = "SymInt padding_idx, bool scale_grad_by_freq"
_GEOMETRY = "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation"
_NO_PADDING = -1


def embedding(
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    *,
    scale: float | Tensor,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
    collector: Tensor | None,
    armed: Tensor | None,
) -> Tensor:
    """:func:`increlora_rs.torch_ops.embedding` in a graph; the rest as in
    :func:`increlora_rs.compiled.adapter`."""
    padding = _NO_PADDING if padding_idx is None else padding_idx
    result: Tensor = torch.ops.increlora.embedding_forward(
        ids, a, b, e, *_split(scale, collector, armed), padding, scale_grad_by_freq
    )
    return result


def convolution(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    *,
    geometry: Geometry,
    scale: float | Tensor,
    collector: Tensor | None,
    armed: Tensor | None,
) -> Tensor:
    """:func:`increlora_rs.torch_ops.convolution` in a graph, of an input that was dropped from and padded;
    the rest as in :func:`increlora_rs.compiled.adapter`."""
    result: Tensor = torch.ops.increlora.convolution_forward(
        x, a, b, e, *_split(scale, collector, armed), *geometry
    )
    return result


def _split(
    scale: float | Tensor, collector: Tensor | None, armed: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, float]:
    if isinstance(scale, Tensor):
        return scale, collector, armed, 1.0
    return None, collector, armed, scale


def _times(scale: float, factor: Tensor | None) -> float:
    return scale if factor is None else scale * float(factor.item())


def _is_armed(armed: Tensor | None) -> bool:
    return armed is not None and bool(armed.item())


def _padding_of(padding_idx: int) -> int | None:
    return None if padding_idx == _NO_PADDING else padding_idx


@torch.library.custom_op(
    "increlora::embedding_forward",
    mutates_args=(),
    schema=f"(Tensor ids, Tensor a, Tensor b, Tensor e, {_ASKED}, {_LOOKUP}) -> Tensor",
)
def _embedding_forward(  # type: ignore[no-untyped-def]
    ids, a, b, e, factor, collector, armed, scale, padding_idx, scale_grad_by_freq
):
    with without_autocast(a.device.type):
        return updates.embedding(
            ids, a, b, e, _times(scale, factor), _padding_of(padding_idx), scale_grad_by_freq
        )


@_embedding_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    ids, a, b, e, factor, collector, armed, scale, padding_idx, scale_grad_by_freq
):
    return b.new_empty((*ids.shape, b.shape[0]))


@torch.library.custom_op(
    "increlora::embedding_backward",
    mutates_args=(),
    schema="(Tensor gy, Tensor ids, Tensor a, Tensor b, Tensor e, Tensor? factor, Tensor? armed, "
    f"float scale, {_LOOKUP}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _embedding_backward(  # type: ignore[no-untyped-def]
    gy, ids, a, b, e, factor, armed, scale, padding_idx, scale_grad_by_freq
):
    scale = _times(scale, factor)
    with without_autocast(a.device.type):
        ga, gb, ge = updates.embedding_gradients(
            gy, ids, a, b, e, scale, _padding_of(padding_idx), scale_grad_by_freq
        )
        importance = a.new_zeros(1, dtype=torch.float64)
        if _is_armed(armed):
            importance += updates.embedding_importance(gy, scale, ids, a, b, e)
    return ga, gb, ge, importance


@_embedding_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    gy, ids, a, b, e, factor, armed, scale, padding_idx, scale_grad_by_freq
):
    return *_like_factors(a, b, e), a.new_empty(1, dtype=torch.float64)


@torch.library.custom_op(
    "increlora::convolution_forward",
    mutates_args=(),
    schema=f"(Tensor x, Tensor a, Tensor b, Tensor e, {_ASKED}, {_GEOMETRY}) -> Tensor",
)
def _convolution_forward(  # type: ignore[no-untyped-def]
    x, a, b, e, factor, collector, armed, scale, *geometry
):
    with without_autocast(x.device.type):
        return updates.convolution(x, a, b, e, _times(scale, factor), Geometry(*geometry))


@_convolution_forward.register_fake
def _(x, a, b, e, factor, collector, armed, scale, *geometry):  # type: ignore[no-untyped-def]
    kernel_size, *places = geometry
    dims = len(kernel_size)
    weight = x.new_empty((b.shape[0], x.shape[-dims - 1], *kernel_size))
    return updates.CONVOLUTIONS[dims](x, weight, None, *places)


@torch.library.custom_op(
    "increlora::convolution_backward",
    mutates_args=(),
    schema="(Tensor gy, Tensor x, Tensor a, Tensor b, Tensor e, Tensor? factor, Tensor? armed, float scale, "
    f"bool needs_x, {_GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _convolution_backward(  # type: ignore[no-untyped-def]
    gy, x, a, b, e, factor, armed, scale, needs_x, *geometry
):
    scale, geometry = _times(scale, factor), Geometry(*geometry)
    with without_autocast(x.device.type):
        gx, ga, gb, ge = updates.convolution_gradients(gy, x, a, b, e, scale, geometry, needs_x=needs_x)
        importance = a.new_zeros(1, dtype=torch.float64)
        if _is_armed(armed):
            importance += updates.convolution_importance(geometry, gy, scale, x, a, b, e)
    return x.new_empty(0) if gx is None else gx, ga, gb, ge, importance


@_convolution_backward.register_fake
def _(gy, x, a, b, e, factor, armed, scale, needs_x, *geometry):  # type: ignore[no-untyped-def]
    gx = x.new_empty(x.shape if needs_x else 0)
    return gx, *_like_factors(a, b, e), a.new_empty(1, dtype=torch.float64)


def _like_factors(*factors: Tensor) -> list[Tensor]:
    return [factor.new_empty(factor.shape) for factor in factors]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, a, b, e, factor, collector, armed, ctx.scale, *ctx.rest = inputs
    ctx.asked = collector is not None
    ctx.save_for_backward(x, a, b, e, factor, armed)


def _embedding_gradients(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, importance = torch.ops.increlora.embedding_backward(
        gy, *ctx.saved_tensors, ctx.scale, *ctx.rest
    )
    return None, *gradients, None, importance if ctx.asked else None, None, None, None, None


def _convolution_gradients(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    needs_x = ctx.needs_input_grad[0]
    gx, *gradients, importance = torch.ops.increlora.convolution_backward(
        gy, *ctx.saved_tensors, ctx.scale, needs_x, *ctx.rest
    )
    asked = importance if ctx.asked else None
    return gx if needs_x else None, *gradients, None, asked, None, None, *[None] * len(ctx.rest)


_embedding_forward.register_autograd(_embedding_gradients, setup_context=_save)
_convolution_forward.register_autograd(_convolution_gradients, setup_context=_save)
