"""What the backward passes of a step add up for each module: the one thing that a training asks them for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor


class Gauge(ABC):
    """A sum over the backward passes of a step, for every module of an adapter, by its slot.

    Backward passes alone add to it, so evaluation, inference and the second forward pass of a checkpoint do
    not count. A compiled graph hands its part over as the gradient of a tensor, the module's collector.

    Args:
        total: What was added, flat, the modules one after the other: what a step averages over processes,
            and drops.
        lengths: How many numbers of ``total`` each module has; left out where no graph will ask.
    """

    name: ClassVar[str]
    # Do the operations add it by themselves, from what their own backward passes hold, with dropout? Then
    # ``total`` is float64, a number a module. Else they show what the frozen weight's gradient is made of.
    fused: ClassVar[bool] = False

    def __init__(self, total: Tensor, lengths: Sequence[int] = ()) -> None:
        self._hold(total, lengths)

    def _hold(self, total: Tensor, lengths: Sequence[int] = ()) -> None:
        self._total = total
        self._collectors = [_leaf(part) for part in total.split(list(lengths))] if lengths else []

    @property
    def total(self) -> Tensor:
        """What was added since it was last made 0."""
        return self._total

    def add(self, slot: int, gy: Tensor, x: Tensor) -> None:
        """A linear layer's pass: gy (tokens, out) and x (tokens, in), before dropout."""
        raise TypeError(f"the gauge {self.name!r} is added by the operations themselves")

    def add_lookup(self, slot: int, gy: Tensor, ids: Tensor) -> None:
        """An embedding's: gy (tokens, out), x 1 at ``ids[t]`` and 0 elsewhere in its row t."""
        raise TypeError(f"the gauge {self.name!r} is added by the operations themselves")

    def add_gradient(self, slot: int, gradient: Tensor) -> None:
        """That of a layer whose weight's gradient exists, as a matrix (out, in): a convolution."""
        raise TypeError(f"the gauge {self.name!r} is added by the operations themselves")

    # In a graph, where the classes are found by name.

    def collector(self, slot: int) -> Tensor:
        """The leaf whose gradient is the module's part of ``total``."""
        return self._collectors[slot]

    def given(self, slot: int) -> list[Tensor]:
        """What a graph needs to add to the module's part."""
        return []

    @classmethod
    @abstractmethod
    def empty(cls, like: Tensor, size: tuple[int, int], given: Sequence[Tensor]) -> Tensor:
        """A vector, not filled, for one module of ``size`` (out, in), on the device of ``like``."""

    @classmethod
    @abstractmethod
    def of_one(cls, total: Tensor, size: tuple[int, int], given: Sequence[Tensor]) -> Gauge:
        """That of one module, in slot 0, which adds to a vector of :meth:`empty`."""


def _leaf(gradient: Tensor) -> Tensor:
    # Nobody reads its numbers, so one stands for all.
    leaf = gradient.new_zeros(1).expand(gradient.shape).requires_grad_()
    # Autograd adds to the gradient in place.
    leaf.grad = gradient
    return leaf
