"""Low-rank updates of linear layers in a graph, see :mod:`increlora_rs.ops.graph`: operations that stand
there as they are. The seed of a dropout mask is a tensor too."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _core
from .autocast import without_autocast
from .device import prepare, stream
from .graph import ASKED, SCALE, TAKEN, empty_total, gradients_of_asked, keep, kept, opened, split, value
from .probe import Asked

_MASKED_BY_KERNELS = (torch.float32, torch.float16, torch.bfloat16)
_FACTORS = f"Tensor a, Tensor b, Tensor e, Tensor? seed, {SCALE}, float dropout"


def add_low_rank(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    scale: float | Tensor,
    dropout: float,
    asked: Asked,
) -> Tensor:
    """:func:`increlora_rs.ops.linear.add_low_rank` in a graph.

    Args:
        x: Of the dtype of the product.
        scale: The scale, or float64 (1) on the CPU that holds it.
        asked: Of :func:`increlora_rs.ops.probe.for_graph`.
    """
    result: Tensor = torch.ops.increlora.add_low_rank(
        y, x, a, b, e, _seed(dropout), *split(scale), dropout, *asked
    )[0]
    return result


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    scale: float | Tensor,
    dropout: float,
    asked: Asked,
) -> Tensor:
    """:func:`increlora_rs.ops.linear.low_rank_linear` in a graph; the rest as in :func:`add_low_rank`."""
    result: Tensor = torch.ops.increlora.low_rank_linear(
        x, weight, bias, a, b, e, _seed(dropout), *split(scale), dropout, *asked
    )[0]
    return result


def _seed(dropout: float) -> Tensor | None:
    return torch.randint(2**63 - 1, (), device="cpu") if dropout > 0.0 else None


def _empty_kept(x: Tensor, rows: Any, dropout: float) -> tuple[Tensor, Tensor]:
    """Empty tensors like those that the backward pass needs: ``A drop(x)`` and the mask."""
    tokens = math.prod(x.shape[:-1])
    t = x.new_empty((tokens, rows), dtype=_dtype_of_t(x))
    return t, x.new_empty(_mask_size(x, dropout), dtype=torch.uint8)


def _dtype_of_t(x: Tensor) -> torch.dtype:
    # The CPU's loops keep bfloat16's sums in float32.
    return torch.float32 if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x.dtype


def _mask_size(x: Tensor, dropout: float) -> int:
    """Bytes of the mask that is kept; the CPU draws it anew."""
    if dropout == 0.0 or x.device.type == "cpu":
        return 0
    elements = math.prod(x.shape)
    return (elements + 7) // 8 if _is_packed(x) else elements


def _is_packed(x: Tensor) -> bool:
    """Does the device keep one bit of an element, not one byte?"""
    return x.dtype in _MASKED_BY_KERNELS and prepare(x.device.index or 0)


def _to_keep(x: Tensor, t: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    if _mask_size(x, dropout) == 0 or mask is None:
        return t.to(_dtype_of_t(x)), x.new_empty(0, dtype=torch.uint8)
    return t.to(_dtype_of_t(x)), mask.reshape(-1)


@torch.library.custom_op(
    "increlora::add_low_rank",
    mutates_args=(),
    schema=f"(Tensor y, Tensor x, {_FACTORS}, {ASKED}) -> (Tensor, Tensor, Tensor)",
)
def _add_low_rank(  # type: ignore[no-untyped-def]
    y, x, a, b, e, seed, factor, scale, dropout, *asked
):
    result = y.clone(memory_format=torch.contiguous_format)
    with without_autocast(x.device.type):
        t, mask = _core.adapter_forward(
            result.view(-1, y.shape[-1]),
            x.reshape(-1, x.shape[-1]),
            a,
            b,
            e,
            scale * value(factor, 1.0),
            dropout,
            value(seed, 0),
            stream(x.device),
        )
    return result, *_to_keep(x, t, mask, dropout)


@_add_low_rank.register_fake
def _(y, x, a, b, e, seed, factor, scale, dropout, *asked):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape), *_empty_kept(x, a.shape[0], dropout)


@torch.library.custom_op(
    "increlora::low_rank_linear",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}, {ASKED}) -> (Tensor, Tensor, Tensor)",
)
def _low_rank_linear(  # type: ignore[no-untyped-def]
    x, weight, bias, a, b, e, seed, factor, scale, dropout, *asked
):
    with without_autocast(x.device.type):
        y, t, mask = _core.linear_forward(
            x,
            weight,
            bias,
            a,
            b,
            e,
            scale * value(factor, 1.0),
            dropout,
            value(seed, 0),
            stream(x.device),
        )
    return y, *_to_keep(x, t, mask, dropout)


@_low_rank_linear.register_fake
def _(x, weight, bias, a, b, e, seed, factor, scale, dropout, *asked):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], b.shape[0])), *_empty_kept(x, a.shape[0], dropout)


@torch.library.custom_op(
    "increlora::low_rank_backward",
    mutates_args=(),
    schema=f"(Tensor gy, Tensor x, Tensor t, Tensor mask, Tensor? weight, {_FACTORS}, bool needs_x, {TAKEN})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _low_rank_backward(  # type: ignore[no-untyped-def]
    gy, x, t, mask, weight, a, b, e, seed, factor, scale, dropout, needs_x, *taken
):
    flat_gy, flat = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])
    total, gauge = opened(x, (gy.shape[-1], x.shape[-1]), *taken)
    packed = None
    if mask.numel():
        packed = mask if _is_packed(x) else mask.view(flat.shape)
    with without_autocast(x.device.type):
        if gauge is not None and not gauge.fused:
            gauge.add(0, flat_gy, flat)
        gx, ga, gb, ge = _core.adapter_backward(
            flat_gy,
            flat,
            t,
            a,
            b,
            e,
            scale * value(factor, 1.0),
            packed,
            dropout,
            needs_x,
            total if gauge is not None and gauge.fused else None,
            0,
            value(seed, 0),
            weight,
            stream(x.device),
        )
    return x.new_empty(0) if gx is None else gx.view(x.shape), ga, gb, ge, total


@_low_rank_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    gy, x, t, mask, weight, a, b, e, seed, factor, scale, dropout, needs_x, armed, given, gauge
):
    gx = x.new_empty(x.shape if needs_x else 0)
    total = empty_total(x, (gy.shape[-1], x.shape[-1]), given, gauge)
    return gx, a.new_empty(a.shape), b.new_empty(b.shape), e.new_empty(e.shape), total


def _save(ctx: Any, rest: list[Any], x: Tensor, weight: Tensor | None, output: Any) -> None:
    a, b, e, seed, factor, ctx.scale, ctx.dropout, *asked = rest
    _, t, mask = output
    keep(ctx, (x, t, mask, weight, a, b, e, seed, factor), asked)


def _save_added(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, x, *rest = inputs
    _save(ctx, rest, x, None, output)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, *rest = inputs
    _save(ctx, rest, x, weight, output)


def _gradients(ctx: Any, gy: Tensor, needs_x: bool) -> tuple[Any, ...]:
    """For x, and for the arguments from a to the last."""
    tensors, taken = kept(ctx)
    gx, ga, gb, ge, total = torch.ops.increlora.low_rank_backward(
        gy, *tensors, ctx.scale, ctx.dropout, needs_x, *taken
    )
    return gx if needs_x else None, ga, gb, ge, None, None, None, None, *gradients_of_asked(ctx, total)


def _gradients_of_added(ctx: Any, gy: Tensor, *_: Any) -> tuple[Any, ...]:
    return gy, *_gradients(ctx, gy, ctx.needs_input_grad[1])


def _gradients_of_linear(ctx: Any, gy: Tensor, *_: Any) -> tuple[Any, ...]:
    gx, *rest = _gradients(ctx, gy, ctx.needs_input_grad[0])
    return gx, None, None, *rest


_add_low_rank.register_autograd(_gradients_of_added, setup_context=_save_added)
_low_rank_linear.register_autograd(_gradients_of_linear, setup_context=_save_linear)
