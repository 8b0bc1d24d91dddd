"""The sensitivity ``sum |dW * G|`` of each module, which the operations add up themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Sensitivity:
    """A float64 number a module."""

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def attach(self, probe: Any, scheduler: Any) -> None:
        """Gives the layers what they add to."""
        probe.attach(scheduler, self.total)

    def arm(self, probe: Any, wanted: bool) -> None:
        """Asks the next backward passes for it, or no longer."""
        probe.arm(self.total if wanted else None)
