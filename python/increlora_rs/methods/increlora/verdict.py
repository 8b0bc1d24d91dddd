"""Does it pay to move ranks? What came is held against what left for it.

A choice is a forecast: that a component will be worth more where it goes than where it comes from. So a part
of what was forecast has to come true, first of a small trial, then of all that came so far; else ranks stay
where they are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

_Vector = npt.NDArray[np.float64]
# How many times as much as what left for it a component has to be worth. At the trial that was 4 to 30 on a
# bed where moving gains, 0.9 and 1.5 on two where it loses.
_PAYS = 2.0
# A ratio counts as much at most, and one over it at least: a component worth nothing is no infinite loss.
_MOST = 1e3


class Verdict:
    """What components were worth that came, over those that left for them: the geometric mean.

    Attributes:
        waiting: By event, the median worth of what left at it, until what came is judged.
    """

    def __init__(self) -> None:
        self.waiting: dict[int, float] = {}
        self._logarithms, self._count = 0.0, 0

    @property
    def ratio(self) -> float | None:
        """That mean; None before the first is judged."""
        return math.exp(self._logarithms / self._count) if self._count else None

    @property
    def pays(self) -> bool | None:
        """Is it enough? None where nobody knows yet."""
        return None if self.ratio is None else self.ratio >= _PAYS

    def moved(self, event: int, left: _Vector) -> None:
        """Notes what left at an event at which others came.

        Args:
            left: What they were worth for each parameter, over the mean of all.
        """
        self.waiting[event] = max(float(np.median(left)), 1.0 / _MOST**2)

    def judge(self, event: int, worth: _Vector, births: npt.NDArray[np.int64]) -> None:
        """Judges what came at an event.

        Args:
            worth: What components are worth for each parameter, over the mean of all.
            births: Of them.
        """
        ratios = np.clip(worth[births == event] / self.waiting.pop(event), 1.0 / _MOST, _MOST)
        self._logarithms += float(np.log(ratios).sum())
        self._count += len(ratios)

    def state(self) -> dict[str, Any]:
        """For the checkpoint, whose keys are strings."""
        return {
            "waiting": [list(pair) for pair in self.waiting.items()],
            "logarithms": self._logarithms,
            "count": self._count,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave."""
        self.waiting = {int(event): float(worth) for event, worth in state["waiting"]}
        self._logarithms, self._count = state["logarithms"], state["count"]
