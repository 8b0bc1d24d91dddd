"""An update of a linear layer whose two passes are calls into Rust, as a differentiable operation: dtypes and
autocast decided here, once for every such update."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import as_autocast, compute_dtype, without_autocast
from .linear import new_seed
from .observed import refuse_gauge
from .update import Call

Kept = tuple[Tensor, Tensor | None, Tensor | None]


class Given(NamedTuple):
    """What a backward pass is given beside the gradient of y.

    Args:
        x: The input, (tokens, in); None where the op does without.
        kept: What the forward pass gave for it.
        features: Size of x.
        needs_x, needs_parameters: Which gradients are wanted.
        options: Mask, dropout, its seed and the weight of the base layer, as both Rust calls name them.
    """

    x: Tensor | None
    kept: Tensor | None
    features: int
    needs_x: bool
    needs_parameters: bool
    options: dict[str, Any]


class CoreOp(Protocol):
    """The calls into Rust of one update; it holds numbers, no tensors."""

    @property
    def keeps_x(self) -> bool:
        """Does the backward pass read x?"""

    def forward(self, x: Tensor, parameters: tuple[Tensor, ...], options: dict[str, Any]) -> Kept:
        """y, what the backward pass needs, and the mask where it is kept. ``options``: ``y`` (tokens, out),
        to be added to in place, or ``weight`` and ``bias`` of the base layer; dropout and seed."""

    def backward(self, gy: Tensor, parameters: tuple[Tensor, ...], given: Given) -> tuple[Tensor | None, ...]:
        """The gradients of x, flat, and of the parameters."""


def add(op: CoreOp, y: Tensor, x: Tensor, call: Call, *parameters: Tensor) -> Tensor:
    """``y`` (..., out) and the update of x (..., in), of the shape and dtype of y.

    Raises:
        ValueError: shapes or devices do not fit, or a number is out of range.
        TypeError: a dtype does not fit.
        NotImplementedError: the probe has a gauge, to which no such update shows anything.
    """
    refuse_gauge(call.probe)
    if not x.dim() or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"y has shape {tuple(y.shape)} and x {tuple(x.shape)}; all dimensions but the last must agree"
        )
    result: Tensor = _Apply.apply(op, call, y, x, None, None, *parameters)
    return result


def with_base(
    op: CoreOp, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, *parameters: Tensor
) -> Tensor:
    """The frozen linear layer and the update in one operation, (..., out), of the dtype of x, under autocast
    of autocast's. Raises as :func:`add`."""
    refuse_gauge(call.probe)
    bias = None if bias is None else as_autocast(bias)
    result: Tensor = _Apply.apply(op, call, None, as_autocast(x), as_autocast(weight), bias, *parameters)
    return result


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        op: CoreOp,
        call: Call,
        y: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.op, ctx.call, ctx.dtype = op, call, compute_dtype(x)
        options: dict[str, Any] = {"p": call.dropout, "seed": new_seed(call.dropout)}
        ctx.seed, ctx.shape, ctx.x_dtype = options["seed"], x.shape, x.dtype
        with without_autocast(x.device.type):
            if y is None:
                result, kept, mask = op.forward(x, parameters, {"weight": weight, "bias": bias} | options)
            else:
                if call.inplace and y.is_contiguous():
                    ctx.mark_dirty(y)
                    result = y
                else:
                    result = y.clone(memory_format=torch.contiguous_format)
                flat = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
                onto = {"y": result.view(-1, y.shape[-1])}
                _, kept, mask = op.forward(flat, parameters, onto | options)
        ctx.save_for_backward(x if op.keeps_x else None, kept, mask, weight, *parameters)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, mask, weight, *parameters = ctx.saved_tensors
        op, call, features = ctx.op, ctx.call, ctx.shape[-1]
        if call.probe is not None:
            call.probe.count_backward(call.slot)
        if x is not None:
            x = x.reshape(-1, features).to(ctx.dtype)
        _, _, needs_y, needs_x, _, _, *needed = ctx.needs_input_grad
        options = {"mask": mask, "p": call.dropout, "seed": ctx.seed, "weight": weight}
        given = Given(x, kept, features, needs_x, any(needed), options)
        with without_autocast(gy.device.type):
            gx, *gradients = op.backward(gy.reshape(-1, gy.shape[-1]), tuple(parameters), given)
        if gx is not None:
            gx = gx.view(ctx.shape).to(ctx.x_dtype)
        return None, None, gy if needs_y else None, gx, None, None, *gradients
