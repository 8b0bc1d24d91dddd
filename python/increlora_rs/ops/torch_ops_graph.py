"""The updates of embeddings and convolutions inside torch.compile and torch.export: operations that stand
in a graph as they are, as those of :mod:`increlora_rs.ops.linear_graph` do for linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..gauges.sketch import Sketch, length_of, pairs_of
from . import updates
from .autocast import without_autocast
from .updates import Geometry

_ASKED = "Tensor? factor, Tensor? collector, Tensor? armed, Tensor? omega, Tensor? psi, float scale"
_TAKEN = "Tensor? factor, Tensor? armed, Tensor? omega, Tensor? psi, float scale"
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
    omega: Tensor | None,
    psi: Tensor | None,
) -> Tensor:
    """:func:`increlora_rs.ops.torch_ops.embedding` in a graph; the rest as in
    :func:`increlora_rs.ops.linear_graph.adapter`."""
    padding = _NO_PADDING if padding_idx is None else padding_idx
    result: Tensor = torch.ops.increlora.embedding_forward(
        ids, a, b, e, *_split(scale, collector, armed, omega, psi), padding, scale_grad_by_freq
    )
    return result


def convolution(
    x: Tensor,
    seen: Tensor | None,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    *,
    geometry: Geometry,
    scale: float | Tensor,
    collector: Tensor | None,
    armed: Tensor | None,
    omega: Tensor | None,
    psi: Tensor | None,
) -> Tensor:
    """:func:`increlora_rs.ops.torch_ops.convolution` in a graph, of an input that was dropped from and
    padded, and of the one before dropout where a sketch needs it; the rest as in
    :func:`increlora_rs.ops.linear_graph.adapter`."""
    result: Tensor = torch.ops.increlora.convolution_forward(
        x, seen, a, b, e, *_split(scale, collector, armed, omega, psi), *geometry
    )
    return result


def _split(scale: float | Tensor, *asked: Tensor | None) -> tuple[Tensor | float | None, ...]:
    return (scale, *asked, 1.0) if isinstance(scale, Tensor) else (None, *asked, scale)


def _times(scale: float, factor: Tensor | None) -> float:
    return scale if factor is None else scale * float(factor.item())


def _is_armed(armed: Tensor | None) -> bool:
    return armed is not None and bool(armed.item())


def _padding_of(padding_idx: int) -> int | None:
    return None if padding_idx == _NO_PADDING else padding_idx


def _empty_asked(size: tuple[int, int], like: Tensor, omega: Tensor | None, psi: Tensor | None) -> Tensor:
    """What the collector's gradient is, for a module of ``size``: an importance, or a sketch."""
    if omega is None or psi is None:
        return like.new_empty(1, dtype=torch.float64)
    return omega.new_empty(length_of([size], (omega.shape[0], psi.shape[0])))


def _sketch_in(asked: Tensor, size: tuple[int, int], omega: Tensor, psi: Tensor) -> Sketch:
    left, right = pairs_of(asked, [size], (len(omega), len(psi)))[0]
    return Sketch(left, right, omega, psi, asked)


@torch.library.custom_op(
    "increlora::embedding_forward",
    mutates_args=(),
    schema=f"(Tensor ids, Tensor a, Tensor b, Tensor e, {_ASKED}, {_LOOKUP}) -> Tensor",
)
def _embedding_forward(  # type: ignore[no-untyped-def]
    ids, a, b, e, factor, collector, armed, omega, psi, scale, padding_idx, scale_grad_by_freq
):
    with without_autocast(a.device.type):
        return updates.embedding(
            ids, a, b, e, _times(scale, factor), _padding_of(padding_idx), scale_grad_by_freq
        )


@_embedding_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    ids, a, b, e, factor, collector, armed, omega, psi, scale, padding_idx, scale_grad_by_freq
):
    return b.new_empty((*ids.shape, b.shape[0]))


@torch.library.custom_op(
    "increlora::embedding_backward",
    mutates_args=(),
    schema=f"(Tensor gy, Tensor ids, Tensor a, Tensor b, Tensor e, {_TAKEN}, {_LOOKUP})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _embedding_backward(  # type: ignore[no-untyped-def]
    gy, ids, a, b, e, factor, armed, omega, psi, scale, padding_idx, scale_grad_by_freq
):
    scale, padding = _times(scale, factor), _padding_of(padding_idx)
    size = (b.shape[0], a.shape[1])
    asked = _empty_asked(size, a, omega, psi).zero_()
    with without_autocast(a.device.type):
        factors = updates.embedding_gradients(gy, ids, a, b, e, scale, padding, scale_grad_by_freq)
        if _is_armed(armed) and omega is None:
            asked += updates.embedding_importance(gy, scale, ids, a, b, e)
        elif _is_armed(armed):
            sketch = _sketch_in(asked, size, omega, psi)
            updates.embedding_sketch(sketch, gy, ids, padding, scale_grad_by_freq)
    return *factors, asked


@_embedding_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    gy, ids, a, b, e, factor, armed, omega, psi, scale, padding_idx, scale_grad_by_freq
):
    return *_like_factors(a, b, e), _empty_asked((b.shape[0], a.shape[1]), a, omega, psi)


@torch.library.custom_op(
    "increlora::convolution_forward",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? seen, Tensor a, Tensor b, Tensor e, {_ASKED}, {_GEOMETRY}) -> Tensor",
)
def _convolution_forward(  # type: ignore[no-untyped-def]
    x, seen, a, b, e, factor, collector, armed, omega, psi, scale, *geometry
):
    with without_autocast(x.device.type):
        return updates.convolution(x, a, b, e, _times(scale, factor), Geometry(*geometry))


@_convolution_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    x, seen, a, b, e, factor, collector, armed, omega, psi, scale, *geometry
):
    kernel_size, *places = geometry
    dims = len(kernel_size)
    weight = x.new_empty((b.shape[0], x.shape[-dims - 1], *kernel_size))
    return updates.CONVOLUTIONS[dims](x, weight, None, *places)


@torch.library.custom_op(
    "increlora::convolution_backward",
    mutates_args=(),
    schema="(Tensor gy, Tensor x, Tensor? seen, Tensor a, Tensor b, Tensor e, "
    f"{_TAKEN}, bool needs_x, {_GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _convolution_backward(  # type: ignore[no-untyped-def]
    gy, x, seen, a, b, e, factor, armed, omega, psi, scale, needs_x, *geometry
):
    scale, geometry = _times(scale, factor), Geometry(*geometry)
    size = (b.shape[0], a.shape[1])
    asked = _empty_asked(size, a, omega, psi).zero_()
    with without_autocast(x.device.type):
        gx, *factors = updates.convolution_gradients(gy, x, a, b, e, scale, geometry, needs_x=needs_x)
        if _is_armed(armed) and omega is None:
            asked += updates.convolution_importance(geometry, gy, scale, x, a, b, e)
        elif _is_armed(armed):
            gradient = updates.convolution_weight_gradient(geometry, gy, x if seen is None else seen)
            _sketch_in(asked, size, omega, psi).add_matrix(gradient)
    return x.new_empty(0) if gx is None else gx, *factors, asked


@_convolution_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    gy, x, seen, a, b, e, factor, armed, omega, psi, scale, needs_x, *geometry
):
    gx = x.new_empty(x.shape if needs_x else 0)
    return gx, *_like_factors(a, b, e), _empty_asked((b.shape[0], a.shape[1]), a, omega, psi)


def _like_factors(*factors: Tensor) -> list[Tensor]:
    return [factor.new_empty(factor.shape) for factor in factors]


def _save_embedding(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ids, a, b, e, factor, collector, armed, omega, psi, ctx.scale, *ctx.rest = inputs
    ctx.asked = collector is not None
    ctx.save_for_backward(ids, a, b, e, factor, armed, omega, psi)


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, seen, a, b, e, factor, collector, armed, omega, psi, ctx.scale, *ctx.rest = inputs
    ctx.asked = collector is not None
    ctx.save_for_backward(x, seen, a, b, e, factor, armed, omega, psi)


def _embedding_gradients(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    *factors, asked = torch.ops.increlora.embedding_backward(gy, *ctx.saved_tensors, ctx.scale, *ctx.rest)
    return None, *factors, None, asked if ctx.asked else None, *[None] * (4 + len(ctx.rest))


def _convolution_gradients(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    needs_x = ctx.needs_input_grad[0]
    gx, *factors, asked = torch.ops.increlora.convolution_backward(
        gy, *ctx.saved_tensors, ctx.scale, needs_x, *ctx.rest
    )
    asked = asked if ctx.asked else None
    return gx if needs_x else None, None, *factors, None, asked, *[None] * (4 + len(ctx.rest))


_embedding_forward.register_autograd(_embedding_gradients, setup_context=_save_embedding)
_convolution_forward.register_autograd(_convolution_gradients, setup_context=_save_convolution)
