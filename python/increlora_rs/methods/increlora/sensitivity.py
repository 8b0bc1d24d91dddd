"""The importance of every module: collected by the backward passes, smoothed at each optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ... import _core
from ...gauges import Gauge, Sensitivity
from ...support.untraced import untraced
from ...training.distributed import from_first_, in_any_process
from ...training.modules import AdaptedModule
from .config import IncreLoraConfig
from .unreached import has_learned


class Scores:
    """Smoothed importances and their uncertainties, float64 vectors with a slot a module.

    Args:
        modules: The adapted modules, in model order.
        config: Gives the decays, the norm and the window.
        scaler: The ``GradScaler`` of a float16 training, or None.
    """

    def __init__(self, modules: Sequence[AdaptedModule], config: IncreLoraConfig, scaler: Any | None) -> None:
        self._modules = modules
        self.device = device = modules[0].a.device
        # What the backward passes of a step are asked for.
        self.gauge: Gauge = Sensitivity.of(len(modules), device)
        self._importance = self.gauge.total
        self._mean = torch.zeros_like(self._importance)
        self._uncertainty = torch.zeros_like(self._importance)
        sizes = torch.tensor(
            [module.layer.in_features * module.layer.out_features for module in modules],
            dtype=torch.float64,
            device=device,
        )
        self._norm = 1.0 / (sizes.sqrt() if config.importance_norm == "sqrt" else sizes)
        self._betas = config.beta1, config.beta2
        self._scaler = scaler
        self._stepped = False
        if scaler is not None:
            self._watch(scaler)
        window = config.importance_window
        self._window = _core.importance_window(*self._betas) if window == "auto" else window

    def start(self, seed: int, components: int) -> None:
        """Before the first step: draws what is random, for growths by so many components."""

    def take_step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Before the optimizer acts, where the gauge was armed: takes in what :meth:`plan` does not."""

    def at_growth(self) -> npt.NDArray[np.float64]:
        """The scores that a growth chooses by, the same in every process."""
        scores = self._mean * self._uncertainty
        from_first_(scores)
        chosen_by: npt.NDArray[np.float64] = scores.cpu().numpy()
        return chosen_by

    def reached(self, optimizer: torch.optim.Optimizer) -> npt.NDArray[np.bool_]:
        """Which modules a gradient has reached, the same in every process; before :meth:`at_growth`."""
        counted = (self._mean != 0.0).cpu()
        for k in torch.nonzero(~counted).flatten().tolist():
            counted[k] = has_learned(self._modules[k], optimizer)
        return in_any_process(counted, self.device)

    def directions(self, k: int, components: int) -> tuple[Tensor, Tensor] | None:
        """What new components of module ``k`` start from; None: random numbers."""
        return None

    def wanted(self, steps_to_growth: int) -> bool:
        """Is the importance needed in a step that is so many steps before the next growth?"""
        return self._window is None or steps_to_growth < self._window

    def plan(self, modules: Sequence[AdaptedModule]) -> _core.StepPlan:
        """What takes each step's importances in (eq. 7 and 8), and adds the regulariser's gradient."""
        return _core.StepPlan(
            [module.a for module in modules],
            [module.b for module in modules],
            self._importance,
            self._norm,
            self._mean,
            self._uncertainty,
            *self._betas,
        )

    def loss_scale(self) -> float | None:
        """The loss's scale in the step at hand; None without a scaler."""
        return None if self._scaler is None else float(self._scaler.get_scale())

    def values(self) -> npt.NDArray[np.float64]:
        """The scores S_k (eq. 9), on the host."""
        scores: npt.NDArray[np.float64] = (self._mean * self._uncertainty).cpu().numpy()
        return scores

    def note_step(self) -> None:
        """The optimizer was called, not skipped by the scaler."""
        self._stepped = True

    def _watch(self, scaler: Any) -> None:
        # A scaler skips the optimizer where gradients overflowed; the importance of such a step must
        # not stay for the next one.
        update = getattr(scaler, "update", None)
        if update is None:
            raise TypeError(f"scaler={scaler!r} must be a GradScaler or None.")

        @untraced
        def watched(*args: Any, **kwargs: Any) -> None:
            update(*args, **kwargs)
            if not self._stepped:
                self.forget_step()
            self._stepped = False

        scaler.update = self._watched = watched

    def forget_step(self) -> None:
        """Drops what the backward passes since the last step added."""
        self.gauge.total.zero_()

    def detach(self) -> None:
        """Gives the scaler its own ``update`` back, unless another scheduler has taken it since."""
        if self._scaler is not None and vars(self._scaler).get("update") is self._watched:
            del self._scaler.update

    def state(self) -> dict[str, Any]:
        """Copies of the vectors, for a checkpoint."""
        return {
            "importance": self._importance.clone(),
            "mean": self._mean.clone(),
            "uncertainty": self._uncertainty.clone(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave."""
        self._importance.copy_(saved["importance"])
        self._mean.copy_(saved["mean"])
        self._uncertainty.copy_(saved["uncertainty"])
