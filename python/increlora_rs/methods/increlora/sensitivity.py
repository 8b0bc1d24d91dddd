"""``importance="sensitivity"``: ``sum |dW * G|`` of a module (eq. 6), smoothed at each step (eq. 7 to 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...contract.policy import AdaptedModule, Step
from ...gauges import Sensitivity
from ...training.distributed import from_first_, in_any_process
from ..smoothing import Smoothing
from .config import IncreLoraConfig
from .idle import Idle
from .scores import Scores
from .unreached import has_learned


class SensitivityScores(Scores):
    """Smoothed importances times their uncertainties, float64 vectors with a slot a module. Steps that leave
    an expert idle are no steps to it.

    Args:
        modules, config: As for :class:`Scores`.
    """

    smoothing: Smoothing

    def __init__(self, modules: Sequence[AdaptedModule], config: IncreLoraConfig) -> None:
        super().__init__(modules, config)
        self.gauge = Sensitivity.of(len(modules), self._device)
        sizes = torch.tensor(
            [module.layer.in_features * module.layer.out_features for module in modules],
            dtype=torch.float64,
            device=self._device,
        )
        norm = 1.0 / (sizes.sqrt() if config.importance_norm == "sqrt" else sizes)
        self.smoothing = Smoothing(self.gauge.total, config.beta1, config.beta2, norm)
        self._idle = Idle(modules)
        self._left: tuple[Tensor, Tensor, Tensor] | None = None

    def start(self, seed: int, components: int) -> None:
        """Nothing has been smoothed."""
        self.smoothing.clear()

    def before_smoothing(self, step: Step) -> None:
        """Keeps what is smoothed of modules that the step left idle."""
        self._left = None
        if step.armed and self._idle:
            parts = [self.gauge.total[k : k + 1] for k in self._idle.may_be]
            idle, smoothing = ~self._idle.in_gauge(parts), self.smoothing
            self._left = idle, smoothing.mean.clone(), smoothing.uncertainty.clone()

    def before_step(self, step: Step) -> None:
        """The smoothing took the step in; puts back what it had nothing to say of."""
        if self._left is not None:
            idle, mean, uncertainty = self._left
            self.smoothing.mean.copy_(torch.where(idle, mean, self.smoothing.mean))
            self.smoothing.uncertainty.copy_(torch.where(idle, uncertainty, self.smoothing.uncertainty))

    def at_growth(self) -> npt.NDArray[np.float64]:
        """The scores that a growth chooses by, the same in every process."""
        scores = self.smoothing.scores()
        from_first_(scores)
        chosen_by: npt.NDArray[np.float64] = scores.cpu().numpy()
        return chosen_by

    def reached(self, optimizer: torch.optim.Optimizer) -> npt.NDArray[np.bool_]:
        """Which modules a gradient has reached, the same in every process; before :meth:`at_growth`."""
        counted = (self.smoothing.mean != 0.0).cpu()
        for k in torch.nonzero(~counted).flatten().tolist():
            # Of a module without components nothing can be said.
            counted[k] = self._modules[k].rows == 0 or has_learned(self._modules[k], optimizer)
        return in_any_process(counted, self._device)

    def values(self) -> npt.NDArray[np.float64]:
        """The scores S_k (eq. 9), on the host."""
        scores: npt.NDArray[np.float64] = self.smoothing.scores().cpu().numpy()
        return scores

    def state(self) -> dict[str, Any]:
        """Copies of the smoothed vectors, for a checkpoint."""
        return self.smoothing.state()

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave."""
        self.smoothing.restore(saved)

    def finish(self) -> None:
        """Nothing: a number a module."""
