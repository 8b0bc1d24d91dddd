"""An update without components: the output of the base layer as it is, and what a training asks of it all the
same, as the gradient of a weight whose module has nothing yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..gauges import Gauge
from .autocast import without_autocast
from .modes import in_memory, transformed
from .probe import Probe

# Has a gauge add one backward pass, in a slot, of the gradient of y and of x.
Show = Callable[[Gauge, int, Tensor, Tensor], None]


def untouched(
    y: Tensor,
    x: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    probe: Probe | None,
    slot: int,
    show: Show,
    *,
    inplace: bool = False,
) -> Tensor:
    """``y``, mostly itself.

    It is an output of the factors where somebody needs their gradients, though they have no element: where
    the gauge measures the weight's own gradient, so that there is one even if no other module has anything;
    and where several processes train, for DDP waits for a gradient of each parameter.

    Args:
        y: Output of the base layer.
        x: Its input.
        factors: A (0, in), B (out, 0) and E (0, 1).
        probe, slot: Of the module.
        show: Called in a backward pass that the gauge measures.
        inplace: May y be overwritten? Else a result that is not ``y`` itself is a copy.
    """
    if probe is None or torch.compiler.is_compiling():
        return y
    measured = _measures(probe)
    if not (measured or _in_process_group()):
        return y
    learns = torch.is_grad_enabled() and factors[0].requires_grad
    if not learns or transformed() or not in_memory(y):
        return y
    result: Tensor = _Untouched.apply(y, x if measured else None, probe, slot, show, inplace, *factors)
    return result


def asks(probe: Probe) -> bool:
    """Does anybody need gradients of parameters that have no element?"""
    return _measures(probe) or _in_process_group()


def _measures(probe: Probe) -> bool:
    return probe.armed and probe.gauge is not None and not probe.gauge.fused


def _in_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Untouched(Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor | None,
        probe: Probe,
        slot: int,
        show: Show,
        inplace: bool,
        *factors: Tensor,
    ) -> Tensor:
        ctx.probe, ctx.slot, ctx.show = probe, slot, show
        ctx.save_for_backward(x, *factors)
        if inplace:
            ctx.mark_dirty(y)
            return y
        return y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        probe = ctx.probe
        probe.count_backward(ctx.slot)
        if x is not None and probe.armed:
            with without_autocast(gy.device.type):
                ctx.show(probe.gauge, ctx.slot, gy, x)
        return gy, None, None, None, None, None, *(factor.new_zeros(factor.shape) for factor in factors)
