"""An update that torch's own operations computed; its backward pass shows its gradient to the gauge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .autocast import without_autocast
from .modes import in_memory, transformed
from .probe import Probe


def observed(
    update: Tensor, show: Callable[..., None] | None, probe: Probe | None, slot: int, *tensors: Tensor
) -> Tensor:
    """``update`` itself, whose backward pass the probe counts, and in which ``show(gauge, slot, gradient,
    *tensors)`` is called where the probe asks for it; ``show`` None: no gauge is for such an update.

    In a graph nothing is counted, and what is shown has to be an operation's own, as in ``convolution.py``.

    Raises:
        NotImplementedError: there is a gauge, and nothing to show it.
    """
    if show is None:
        refuse_gauge(probe)
    if show is None and torch.compiler.is_compiling():
        return update
    # Nobody trains by a scheduler what is no number yet, or what a transform makes of it.
    if probe is None or transformed() or not in_memory(update):
        return update
    result: Tensor = _Observed.apply(update, show, probe, slot, *tensors)
    return result


def refuse_gauge(probe: Probe | None) -> None:
    """Raises NotImplementedError where there is a gauge, for an update that shows it nothing."""
    if probe is not None and probe.gauge is not None:
        raise NotImplementedError(
            f"the policy of {probe.title} has a gauge, and its update shows no gradient; take a policy "
            "without, or give observed() a function that shows it."
        )


class _Observed(Function):
    @staticmethod
    def forward(
        ctx: Any, update: Tensor, show: Callable[..., None] | None, probe: Probe, slot: int, *tensors: Tensor
    ) -> Tensor:
        ctx.show, ctx.probe, ctx.slot = show, probe, slot
        ctx.save_for_backward(*tensors)
        return update.view_as(update)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        tensors, probe = ctx.saved_tensors, ctx.probe
        probe.count_backward(ctx.slot)
        if probe.armed:
            with without_autocast(gy.device.type):
                ctx.show(probe.gauge, ctx.slot, gy, *tensors)
        return gy, None, None, None, *[None] * len(tensors)
