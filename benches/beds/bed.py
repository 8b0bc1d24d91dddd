"""A test bed: a frozen model, a training whose batches depend on the seed alone, and a figure at its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .ranks import Sizes

_LEAST = 1e-6


@dataclass(frozen=True)
class Figure:
    """What a bed measures.

    Args:
        name: In words, for the table's head.
        higher_is_better: Else lower.
    """

    name: str
    higher_is_better: bool

    def gain(self, value: float, other: float) -> float:
        """How much better ``value`` is than ``other``: a ratio, above 1 where it is better. Bits may be below
        0, which counts as next to none."""
        value, other = max(value, _LEAST), max(other, _LEAST)
        return value / other if self.higher_is_better else other / value


class Bed(ABC):
    """One bed with one seed.

    Attributes:
        steps: Optimizer steps of a training.
        sizes: (out, in) of every linear layer that may be adapted, by full name.
        planted: The modules in which ranks belong; empty where that is not known.
        spectra: Where it is known what each component of a module is worth: its values, descending, by
            module; else None, and a trained LoRA tells it.
    """

    steps: int
    sizes: Sizes
    planted: frozenset[str] = frozenset()
    spectra: Mapping[str, list[float]] | None = None

    @abstractmethod
    def model(self) -> nn.Module:
        """The frozen model, anew."""

    @abstractmethod
    def loss(self, model: nn.Module, step: int) -> Tensor:
        """The loss of a training step, from 0 on."""

    @abstractmethod
    def observe(self, model: nn.Module) -> None:
        """A pass over what the bed is measured on, for what reads activations on the way."""

    @abstractmethod
    def score(self, model: nn.Module, parameters: int) -> float:
        """The bed's figure for a trained model, by its trained parameters."""
