"""What a growth chooses by: a score of every module, however it is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ... import _core
from ...contract.policy import AdaptedModule, Step
from ...gauges.gauge import Gauge
from ..smoothing import Smoothing
from .config import IncreLoraConfig


class Scores(ABC):
    """The scores of one training.

    Args:
        modules: The adapted modules, in model order.
        config: Gives the decays, the norm and the window.

    Attributes:
        gauge: What the backward passes add up for it.
        smoothing: What smooths its total at each step, if anything does.
    """

    gauge: Gauge
    smoothing: Smoothing | None = None

    def __init__(self, modules: Sequence[AdaptedModule], config: IncreLoraConfig) -> None:
        self._modules, self._config = modules, config
        self._device = modules[0].factors[0].device
        window = config.importance_window
        self._window = _core.importance_window(config.beta1, config.beta2) if window == "auto" else window

    def wanted(self, steps_to_growth: int) -> bool:
        """Is the gauge needed in a step that is so many steps before the next growth?"""
        return self._window is None or steps_to_growth < self._window

    @abstractmethod
    def start(self, seed: int, components: int) -> None:
        """Begins, or begins anew: draws what is random, for growths by so many components."""

    @abstractmethod
    def before_smoothing(self, step: Step) -> None:
        """Before the step's importances are smoothed: keeps what that must leave as it is."""

    @abstractmethod
    def before_step(self, step: Step) -> None:
        """Before the optimizer acts: takes in what the smoothing does not."""

    @abstractmethod
    def at_growth(self) -> npt.NDArray[np.float64]:
        """The scores that a growth chooses by, the same in every process."""

    def after_growth(self) -> None:
        """The growth is over, and has asked for all directions."""
        return None

    @abstractmethod
    def reached(self, optimizer: torch.optim.Optimizer) -> npt.NDArray[np.bool_]:
        """Which modules a gradient has reached, the same in every process; before :meth:`at_growth`."""

    def directions(self, k: int, components: int) -> tuple[Tensor, Tensor] | None:
        """What new components of module ``k`` start from; None: random numbers."""
        return None

    @abstractmethod
    def values(self) -> npt.NDArray[np.float64]:
        """The scores of now, on the host."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Copies of what a checkpoint needs beside the gauge."""

    @abstractmethod
    def restore(self, saved: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave, after :meth:`start`."""

    @abstractmethod
    def finish(self) -> None:
        """Gives back the memory that is for the training alone."""
