"""Importances smoothed over steps, and how uncertain they are (eq. 7 to 9 of IncreLoRA, after AdaLoRA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Smoothing:
    """The vectors of the smoothing; Rust takes a step's importances in, see :class:`Orthogonality`.

    ``mean = beta1 mean + (1 - beta1) I`` with ``I = factor total``, then
    ``uncertainty = beta2 uncertainty + (1 - beta2) |I - mean|``.

    Args:
        total: What a step's backward passes add up, (n,) float64; it becomes 0 when it is taken in.
        beta1: Decay of the mean, in [0, 1).
        beta2: Decay of the uncertainty, likewise.
        factor: What each importance is multiplied by, (n,) float64; None: 1.
    """

    def __init__(self, total: Tensor, beta1: float, beta2: float, factor: Tensor | None = None) -> None:
        self.total, self.beta1, self.beta2 = total, beta1, beta2
        self.factor = torch.ones_like(total) if factor is None else factor
        self.mean, self.uncertainty = torch.zeros_like(total), torch.zeros_like(total)

    def scores(self) -> Tensor:
        """``mean * uncertainty``."""
        return self.mean * self.uncertainty

    def clear(self) -> None:
        """Begins anew."""
        self.mean.zero_()
        self.uncertainty.zero_()

    def state(self) -> dict[str, Any]:
        """Copies of what was smoothed, for a checkpoint."""
        return {"mean": self.mean.clone(), "uncertainty": self.uncertainty.clone()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave."""
        self.mean.copy_(saved["mean"])
        self.uncertainty.copy_(saved["uncertainty"])
