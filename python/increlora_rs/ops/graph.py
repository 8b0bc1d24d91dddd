"""What the operations in a graph of torch.compile or torch.export have in common.

A graph must not hold what changes while a model trains. Ranks are therefore sizes that it does not know, a
scale that follows the rank is a tensor, and what a backward pass adds to a gauge leaves as the gradient of a
tensor that the gauge keeps for it. So one compilation serves a whole training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..gauges import GAUGES, Gauge

# The last arguments of an operation, forward: the module's collector (None where nobody asks), whether the
# backward pass at hand is to add, what the gauge needs for that, and its name in GAUGES.
ASKED = "Tensor? collector, Tensor? armed, Tensor[] given, str gauge"
# Those of its backward pass.
TAKEN = "Tensor? armed, Tensor[] given, str gauge"
# The scale is the product of the two.
SCALE = "Tensor? factor, float scale"


def split(scale: float | Tensor) -> tuple[Tensor | None, float]:
    """A scale as the arguments of :data:`SCALE`."""
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)


def value(tensor: Tensor | None, default: Any) -> Any:
    """The number in ``tensor``."""
    return default if tensor is None else tensor.item()


def empty_total(like: Tensor, size: tuple[int, int], given: Sequence[Tensor], gauge: str) -> Tensor:
    """What the collector's gradient is, for a module of ``size`` (out, in)."""
    return GAUGES[gauge].empty(like, size, given) if gauge else like.new_empty(0)


def opened(
    like: Tensor, size: tuple[int, int], armed: Tensor | None, given: Sequence[Tensor], gauge: str
) -> tuple[Tensor, Gauge | None]:
    """Zeros to which the pass adds, and the gauge that adds, in slot 0, if it is to."""
    total = empty_total(like, size, given, gauge).zero_()
    return total, GAUGES[gauge].of_one(total, size, given) if value(armed, False) else None


def keep(ctx: Any, tensors: Sequence[Tensor | None], asked: Sequence[Any]) -> None:
    """Saves ``tensors`` and what is asked for the backward pass."""
    collector, armed, given, ctx.gauge = asked
    ctx.collected, ctx.given = collector is not None, len(given)
    ctx.save_for_backward(*tensors, armed, *given)


def kept(ctx: Any) -> tuple[Sequence[Any], tuple[Tensor | None, list[Tensor], str]]:
    """The tensors of :func:`keep`, and the arguments of :data:`TAKEN`."""
    saved = ctx.saved_tensors
    end = len(saved) - ctx.given
    return saved[: end - 1], (saved[end - 1], list(saved[end:]), ctx.gauge)


def gradients_of_asked(ctx: Any, total: Tensor) -> tuple[Any, ...]:
    """Of the arguments of :data:`ASKED`."""
    return total if ctx.collected else None, None, [None] * ctx.given, None
