"""What goes into a module: of each feature the sum of its squares over the tokens that a gradient reaches,
and the number of these tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .. import _core
from .gauge import Gauge


class Energy(Gauge):
    """``in`` sums and a count a module, float64, of x before dropout.

    A token counts where its row of the gradient is not 0 as a whole: padding has no part in it.
    """

    name: ClassVar[str] = "energy"

    def __init__(self, total: Tensor, lengths: Sequence[int]) -> None:
        super().__init__(total, lengths)
        self._parts = total.split(list(lengths))

    @classmethod
    def of(cls, features: Sequence[int], device: torch.device | str = "cpu") -> Energy:
        """That of modules with so many input features, 0."""
        lengths = [size + 1 for size in features]
        return cls(torch.zeros(sum(lengths), dtype=torch.float64, device=device), lengths)

    def add(self, slot: int, gy: Tensor, x: Tensor) -> None:
        """Adds the columns' sums of squares, and the number of tokens."""
        _core.add_energy_(self._parts[slot], gy, x)

    @classmethod
    def empty(cls, like: Tensor, size: tuple[int, int], given: Sequence[Tensor]) -> Tensor:
        """A vector for one module."""
        return like.new_empty(size[1] + 1, dtype=torch.float64)

    @classmethod
    def of_one(cls, total: Tensor, size: tuple[int, int], given: Sequence[Tensor]) -> Energy:
        """That of one module."""
        return cls(total, [size[1] + 1])
