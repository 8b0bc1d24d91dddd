"""The adapter inside torch.compile and torch.export: operations that stand in a graph as they are.

A graph must not hold what changes while a model trains. Ranks are therefore sizes that it does not know,
the seed of a dropout mask and a scale that follows the rank are tensors, and the importance leaves as the
gradient of a tensor that the scheduler keeps for it. So one compilation serves a whole training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..gauges.sketch import length_of, pairs_of
from .autocast import without_autocast
from .device import prepare, stream

_MASKED_BY_KERNELS = (torch.float32, torch.float16, torch.bfloat16)


def adapter(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    *,
    scale: float | Tensor,
    dropout: float,
    collector: Tensor | None,
    armed: Tensor | None,
    omega: Tensor | None,
    psi: Tensor | None,
) -> Tensor:
    """:func:`increlora_rs.ops.linear.adapter` in a graph; ``x`` has the dtype of the product.

    Args:
        scale: The scale, or float64 (1) on the CPU that holds it.
        collector: float64 (1), whose gradient is the module's importance; None where nobody asks. With
            ``omega`` and ``psi``, of :class:`increlora_rs.gauges.sketch.Sketch`, it is that sketch's instead.
        armed: bool scalar on the CPU: is the gradient to be computed in this backward pass?
    """
    constant, factor = _split(scale)
    result: Tensor = torch.ops.increlora.adapter_forward(
        y, x, a, b, e, _seed(dropout), factor, collector, armed, omega, psi, constant, dropout
    )[0]
    return result


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    *,
    scale: float | Tensor,
    dropout: float,
    collector: Tensor | None,
    armed: Tensor | None,
    omega: Tensor | None,
    psi: Tensor | None,
) -> Tensor:
    """:func:`increlora_rs.ops.linear.linear` in a graph; the rest as in :func:`adapter`."""
    constant, factor = _split(scale)
    result: Tensor = torch.ops.increlora.linear_forward(
        x, weight, bias, a, b, e, _seed(dropout), factor, collector, armed, omega, psi, constant, dropout
    )[0]
    return result


def _split(scale: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, scale) if isinstance(scale, Tensor) else (scale, None)


def _seed(dropout: float) -> Tensor | None:
    return torch.randint(2**63 - 1, (), device="cpu") if dropout > 0.0 else None


_SHARED = (
    "Tensor? seed, Tensor? factor, Tensor? collector, Tensor? armed, Tensor? omega, Tensor? psi, "
    "float scale, float dropout"
)


def _value(tensor: Tensor | None, default: Any) -> Any:
    return default if tensor is None else tensor.item()


def _kept(x: Tensor, rows: Any, dropout: float) -> tuple[Tensor, Tensor]:
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
    "increlora::adapter_forward",
    mutates_args=(),
    schema=f"(Tensor y, Tensor x, Tensor a, Tensor b, Tensor e, {_SHARED}) -> (Tensor, Tensor, Tensor)",
)
def _adapter_forward(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    seed: Tensor | None,
    factor: Tensor | None,
    collector: Tensor | None,
    armed: Tensor | None,
    omega: Tensor | None,
    psi: Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    result = y.clone(memory_format=torch.contiguous_format)
    with without_autocast(x.device.type):
        t, mask = _core.adapter_forward(
            result.view(-1, y.shape[-1]),
            x.reshape(-1, x.shape[-1]),
            a,
            b,
            e,
            scale * _value(factor, 1.0),
            dropout,
            _value(seed, 0),
            stream(x.device),
        )
    return result, *_to_keep(x, t, mask, dropout)


@_adapter_forward.register_fake
def _(y, x, a, b, e, seed, factor, collector, armed, omega, psi, scale, dropout):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape), *_kept(x, a.shape[0], dropout)


@torch.library.custom_op(
    "increlora::linear_forward",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor e, {_SHARED})"
    " -> (Tensor, Tensor, Tensor)",
)
def _linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    seed: Tensor | None,
    factor: Tensor | None,
    collector: Tensor | None,
    armed: Tensor | None,
    omega: Tensor | None,
    psi: Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(x.device.type):
        y, t, mask = _core.linear_forward(
            x,
            weight,
            bias,
            a,
            b,
            e,
            scale * _value(factor, 1.0),
            dropout,
            _value(seed, 0),
            stream(x.device),
        )
    return y, *_to_keep(x, t, mask, dropout)


@_linear_forward.register_fake
def _(x, weight, bias, a, b, e, seed, factor, collector, armed, omega, psi, scale, dropout):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], b.shape[0])), *_kept(x, a.shape[0], dropout)


@torch.library.custom_op(
    "increlora::adapter_backward",
    mutates_args=(),
    schema="(Tensor gy, Tensor x, Tensor t, Tensor mask, Tensor a, Tensor b, Tensor e, Tensor? weight, "
    "Tensor? seed, Tensor? factor, Tensor? armed, Tensor? omega, Tensor? psi, float scale, float dropout, "
    "bool needs_x)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _adapter_backward(
    gy: Tensor,
    x: Tensor,
    t: Tensor,
    mask: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    factor: Tensor | None,
    armed: Tensor | None,
    omega: Tensor | None,
    psi: Tensor | None,
    scale: float,
    dropout: float,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    flat_gy, flat = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])
    asked, wanted = _empty_asked(gy, x, omega, psi).zero_(), _value(armed, False)
    kept = None
    if mask.numel():
        kept = mask if _is_packed(x) else mask.view(flat.shape)
    with without_autocast(x.device.type):
        if omega is not None and psi is not None and wanted:
            left, right = pairs_of(asked, [(gy.shape[-1], x.shape[-1])], (len(omega), len(psi)))[0]
            _core.add_to_sketch_(left, right, omega, psi, flat_gy, flat)
        gx, ga, gb, ge = _core.adapter_backward(
            flat_gy,
            flat,
            t,
            a,
            b,
            e,
            scale * _value(factor, 1.0),
            kept,
            dropout,
            needs_x,
            asked if omega is None and wanted else None,
            0,
            _value(seed, 0),
            weight,
            stream(x.device),
        )
    return x.new_empty(0) if gx is None else gx.view(x.shape), ga, gb, ge, asked


def _empty_asked(gy: Tensor, x: Tensor, omega: Tensor | None, psi: Tensor | None) -> Tensor:
    """What the collector's gradient is: an importance, or a sketch."""
    if omega is None or psi is None:
        return x.new_empty(1, dtype=torch.float64)
    size = length_of([(gy.shape[-1], x.shape[-1])], (omega.shape[0], psi.shape[0]))
    return omega.new_empty(size)


@_adapter_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    gy, x, t, mask, a, b, e, weight, seed, factor, armed, omega, psi, scale, dropout, needs_x
):
    gx = x.new_empty(x.shape if needs_x else 0)
    asked = _empty_asked(gy, x, omega, psi)
    return gx, a.new_empty(a.shape), b.new_empty(b.shape), e.new_empty(e.shape), asked


def _save(ctx: Any, rest: list[Any], x: Tensor, weight: Tensor | None, output: Any) -> None:
    a, b, e, seed, factor, collector, armed, omega, psi, ctx.scale, ctx.dropout = rest
    _, t, mask = output
    ctx.asked = collector is not None
    ctx.save_for_backward(x, t, mask, a, b, e, weight, seed, factor, armed, omega, psi)


def _save_adapter(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, x, *rest = inputs
    _save(ctx, rest, x, None, output)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, *rest = inputs
    _save(ctx, rest, x, weight, output)


def _gradients(ctx: Any, gy: Tensor, needs_x: bool) -> tuple[Tensor | None, ...]:
    """For x, and for the arguments from a to the last."""
    gx, ga, gb, ge, asked = torch.ops.increlora.adapter_backward(
        gy, *ctx.saved_tensors, ctx.scale, ctx.dropout, needs_x
    )
    asked = asked if ctx.asked else None
    return gx if needs_x else None, ga, gb, ge, None, None, asked, None, None, None, None, None


def _adapter_gradients(ctx: Any, gy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return gy, *_gradients(ctx, gy, ctx.needs_input_grad[1])


def _linear_gradients(ctx: Any, gy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gx, *rest = _gradients(ctx, gy, ctx.needs_input_grad[0])
    return gx, None, None, *rest


_adapter_forward.register_autograd(_adapter_gradients, setup_context=_save_adapter)
_linear_forward.register_autograd(_linear_gradients, setup_context=_save_linear)
