"""The importance of every module: collected by the backward passes, smoothed at each optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import _core
from .adapted import AdaptedModule
from .config import IncreLoraConfig
from .distributed import average_


class Scores:
    """Smoothed importances and their uncertainties, float64 vectors with a slot a module.

    Args:
        modules: The adapted modules, in model order.
        config: Gives the decays, the norm and the window.
        scaler: The ``GradScaler`` of a float16 training, or None.
    """

    def __init__(self, modules: Sequence[AdaptedModule], config: IncreLoraConfig, scaler: Any | None) -> None:
        device = modules[0].a.device
        self.importance = torch.zeros(len(modules), dtype=torch.float64, device=device)
        self._mean = torch.zeros_like(self.importance)
        self._uncertainty = torch.zeros_like(self.importance)
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

    def wanted(self, steps_to_growth: int) -> bool:
        """Is the importance needed in a step that is so many steps before the next growth?"""
        return self._window is None or steps_to_growth < self._window

    def smooth(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the optimizer acts: takes this step's importances in (eq. 7 and 8)."""
        average_(self.importance)
        factor = self._norm
        loss_scale = getattr(optimizer, "grad_scale", None)
        if loss_scale is None and self._scaler is not None:
            loss_scale = self._scaler.get_scale()
        if loss_scale is not None:
            factor = factor / loss_scale
        overflowed = getattr(optimizer, "found_inf", None)
        if overflowed is not None:
            factor = torch.where(overflowed.to(factor) > 0, torch.nan, factor)
        _core.smooth_(self.importance, factor, self._mean, self._uncertainty, *self._betas)
        self.importance.zero_()

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
        update = scaler.update

        def watched(*args: Any, **kwargs: Any) -> None:
            update(*args, **kwargs)
            if not self._stepped:
                self.importance.zero_()
            self._stepped = False

        scaler.update = self._watched = watched

    def detach(self) -> None:
        """Gives the scaler its own ``update`` back, unless another scheduler has taken it since."""
        if self._scaler is not None and vars(self._scaler).get("update") is self._watched:
            del self._scaler.update

    def state(self) -> dict[str, Tensor]:
        """Copies of the vectors, for a checkpoint."""
        return {
            "importance": self.importance.clone(),
            "mean": self._mean.clone(),
            "uncertainty": self._uncertainty.clone(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave."""
        self.importance.copy_(saved["importance"])
        self._mean.copy_(saved["mean"])
        self._uncertainty.copy_(saved["uncertainty"])
