"""What the backward passes of a step add up for each module."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Gauge(Protocol):
    """A sum over the backward passes of a step, for every module of an adapter."""

    total: Tensor

    def attach(self, probe: Any, scheduler: Any) -> None:
        """Gives the layers what they add to."""

    def arm(self, probe: Any, wanted: bool) -> None:
        """Asks the next backward passes for it, or no longer."""
