"""The adapter as a differentiable operation: dtype and autocast decided here, the work in Rust."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _core
from . import linear_graph as compiled
from .autocast import as_autocast, compute_dtype, without_autocast
from .device import stream
from .modes import readable
from .probe import Probe, asked_of


def adapter(
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
        probe: Collects the module's importance in its slot ``slot`` where it asks for it.

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
        return compiled.adapter(y, x, a, b, e, scale=scale, dropout=dropout, **asked_of(probe, slot))
    result: Tensor = _Adapter.apply(y, x, a, b, e, scale, dropout, inplace, probe, slot)
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
    dropout: float = 0.0,
    probe: Probe | None = None,
    slot: int = 0,
) -> Tensor:
    """A frozen linear layer and its update in one operation: ``x W^T + bias + scale * B (E * (A drop(x)))``.

    As :func:`adapter` after ``torch.nn.functional.linear``, with fewer passes over the large matrices:
    the update is written first and the product added to it, forward and backward alike. Only for
    :func:`fits_linear`.

    Args:
        x: Input, (..., in).
        weight: (out, in), without a gradient. bias: (out) or None, without a gradient.
        a, b, e, scale, dropout, probe, slot: As in :func:`adapter`.

    Returns:
        Tensor (..., out) of the dtype of x, under autocast of autocast's.

    Raises:
        ValueError: shapes or devices do not fit, or a number is out of range.
        TypeError: a dtype does not fit.
    """
    x, weight = as_autocast(x), as_autocast(weight)
    bias = None if bias is None else as_autocast(bias)
    if torch.compiler.is_compiling():
        asked = asked_of(probe, slot)
        return compiled.linear(x, weight, bias, a, b, e, scale=scale, dropout=dropout, **asked)
    result: Tensor = _Linear.apply(x, weight, bias, a, b, e, scale, dropout, probe, slot)
    return result


def fits_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False) -> bool:
    """Can :func:`linear` stand for the base layer: frozen, and of one dtype with x, if need be by autocast?

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


def _new_seed(dropout: float) -> int:
    # From torch's generator, so that manual_seed and a checkpoint's replay hold.
    return int(torch.randint(2**63 - 1, ())) if dropout > 0.0 else 0


class _Adapter(torch.autograd.Function):
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
        ctx.seed = _new_seed(dropout)
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


class _Linear(torch.autograd.Function):
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
        ctx.seed = _new_seed(dropout)
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
    importance = sketch = None
    if ctx.probe is not None:
        ctx.probe.count_backward(ctx.slot)
        importance, sketch = ctx.probe.importance, ctx.probe.sketch(ctx.slot)
    flat_gy, flat = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1]).to(ctx.dtype)
    with without_autocast(x.device.type):
        if sketch is not None:
            # Before dropout: the gradient of the weight itself, and without the mask's noise.
            sketch.add(flat_gy, flat)
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
            importance,
            ctx.slot,
            ctx.seed,
            weight,
            stream(x.device),
        )
    if gx is not None:
        gx = gx.view(x.shape).to(x.dtype)
    return gx, ga, gb, ge
