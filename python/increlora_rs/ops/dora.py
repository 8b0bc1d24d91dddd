"""DoRA (arXiv 2402.09353, eq. 5) around an update: each output of the layer is multiplied by a magnitude over
the norm of its row of ``W + s B diag(E) A``, which is computed without that matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .autocast import without_autocast
from .graph import SCALE, split, value
from .modes import transformed
from .scaled import scaled_b
from .update import LowRank


def row_squares(weight: Tensor) -> Tensor:
    """``||W_o||^2`` of each row of W (out, in): (out), float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square_()


def row_norms(weight: Tensor, update: LowRank, squares: Tensor | None = None) -> Tensor:
    """``||W_o + s (B diag(E) A)_o||`` of each row, without a gradient, as section 4.3 has it.

    With P = s B diag(E) it is the root of ``||W_o||^2 + 2 <P_o, W_o A^T> + P_o A A^T P_o^T``: the one product
    that reads W is that with A, as large as the layer's own for as many tokens as there are components.

    Args:
        weight: W (out, in), of any floating-point dtype, which the product with A has.
        update: The factors.
        squares: :func:`row_squares` of W; None: computed here.

    Returns:
        Tensor (out), float32 or wider.
    """
    if torch.compiler.is_compiling():
        in_graph: Tensor = torch.ops.increlora.dora_row_norms(
            weight.detach(), update.a.detach(), update.b.detach(), update.e.detach(), *split(update.scale)
        )
        return in_graph
    with torch.no_grad():
        return _row_norms(weight, update.a, update.b, update.e, float(update.scale), squares)


def _row_norms(
    weight: Tensor, a: Tensor, b: Tensor, e: Tensor, scale: float, squares: Tensor | None = None
) -> Tensor:
    squares = row_squares(weight) if squares is None else squares
    if not len(a):
        return squares.sqrt()
    # A merge within autocast must not round what it writes for good.
    with without_autocast(weight.device.type):
        shared = (weight @ a.to(weight.dtype).t()).to(squares.dtype)
        a, b, e = (factor.to(squares.dtype) for factor in (a, b, e))
        p = scaled_b(a, b, e, scale)
        inner = torch.addmm(shared, p, a @ a.t(), beta=2.0)
        # Where the update takes a row to nothing, rounding may take it below.
        return (squares + (p * inner).sum(1)).clamp_(min=0.0).sqrt_()


@torch.library.custom_op(
    "increlora::dora_row_norms",
    mutates_args=(),
    schema=f"(Tensor weight, Tensor a, Tensor b, Tensor e, {SCALE}) -> Tensor",
)
def _row_norms_in_graph(weight, a, b, e, factor, scale):  # type: ignore[no-untyped-def]
    return _row_norms(weight, a, b, e, scale * value(factor, 1.0))


@_row_norms_in_graph.register_fake
def _(weight, a, b, e, factor, scale):  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape[:1], dtype=torch.promote_types(weight.dtype, torch.float32))


def gain_of(magnitude: Tensor, norms: Tensor) -> Tensor:
    """``m_o / ||.||``, what a row is multiplied by: (out). A row of zeros has no direction, and keeps what it
    gives, 0, with a gain of 1, so that its update can give it one."""
    there = norms > 0.0
    return torch.where(there, magnitude / torch.where(there, norms, 1.0), 1.0)


def magnified(
    y: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None, *, channel: int, inplace: bool = False
) -> Tensor:
    """``bias + m / ||.|| * (y - bias)``, differentiable once in y and m.

    Args:
        y: Output of the base layer and its update.
        magnitude: m (out).
        norms: (out), without a gradient.
        bias: Of the base layer, (out) or None; it has no magnitude.
        channel: The dimension of y that is (out), negative.
        inplace: May y be overwritten, where no gradient needs it?

    Returns:
        Tensor of the shape and dtype of y; computed in that of the norms and rounded once.
    """
    if torch.compiler.is_compiling() or transformed():
        gain, rest = _along(_gain_and_rest(magnitude, norms, bias), y.dim(), channel)
        return (y * gain if rest is None else y * gain + rest).to(y.dtype)
    if torch.is_grad_enabled() and (y.requires_grad or magnitude.requires_grad):
        result: Tensor = _Magnified.apply(y, magnitude, norms, bias, channel)
        return result
    return _magnified(y, magnitude, norms, bias, channel, y if inplace else None)


def _gain_and_rest(magnitude: Tensor, norms: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What y is multiplied by, and what is added then: of the bias what the product takes from it."""
    gain = gain_of(magnitude, norms)
    return gain, None if bias is None else (1.0 - gain) * bias.detach()


def _along(tensors: tuple[Tensor, Tensor | None], dims: int, channel: int) -> tuple[Tensor, Tensor | None]:
    """Vectors (out) as they go with a tensor of ``dims`` dimensions."""
    ones = [1] * (-1 - channel)
    first, second = tensors
    return first.view(-1, *ones), None if second is None else second.view(-1, *ones)


def _magnified(
    y: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None, channel: int, out: Tensor | None
) -> Tensor:
    out = torch.empty_like(y) if out is None else out
    with without_autocast(y.device.type):
        gain, rest = _along(_gain_and_rest(magnitude, norms, bias), y.dim(), channel)
        if rest is None:
            return torch.mul(y, gain, out=out)
        return torch.addcmul(rest, y, gain, out=out)


class _Magnified(Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None, channel: int
    ) -> Tensor:
        ctx.channel = channel
        ctx.save_for_backward(y, magnitude, norms, bias)
        return _magnified(y, magnitude, norms, bias, channel, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        y, magnitude, norms, bias = ctx.saved_tensors
        channel = ctx.channel
        before = gm = None
        with without_autocast(gy.device.type):
            if ctx.needs_input_grad[0]:
                before = _magnified(gy, magnitude, norms, None, channel, None)
            if ctx.needs_input_grad[1]:
                moved = _of_channel(gy * y, channel, norms.dtype)
                if bias is not None:
                    moved = moved - bias * _of_channel(gy, channel, norms.dtype)
                there = norms > 0.0
                gm = torch.where(there, moved / torch.where(there, norms, 1.0), 0.0).to(magnitude.dtype)
        return before, gm, None, None, None


def _of_channel(tensor: Tensor, channel: int, dtype: torch.dtype) -> Tensor:
    """The sum over all dimensions but one: (out)."""
    return tensor.movedim(channel, -1).reshape(-1, tensor.shape[channel]).sum(0, dtype=dtype)
