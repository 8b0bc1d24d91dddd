"""How the ranks of a training changed: what the scheduler keeps of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class GrowthHistory:
    """Ranks and scores of all modules at every growth.

    Args:
        modules: Full module names, in model order.
        budget: Total rank that the training aims at, or number of parameters where there are ``costs``; None:
            it aims at none.
        first_ranks: Rank of each module before the first growth.
        steps: Optimizer step of each growth.
        ranks: For each growth, the ranks that it left, by module.
        scores: For each growth, the scores S_k that it chose by, by module; NaN where they were not kept.
        step: Optimizer steps taken.
        costs: Parameters of a component of each module, where the budget is in parameters; else None.
    """

    modules: list[str]
    budget: int | None
    first_ranks: list[int]
    steps: list[int] = field(default_factory=list)
    ranks: list[list[int]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    step: int = 0
    costs: list[int] | None = None

    def add(self, step: int, ranks: list[int], scores: list[float]) -> None:
        """Takes a growth in."""
        self.steps.append(step)
        self.ranks.append(ranks)
        self.scores.append(scores)
        self.step = step

    def until(self, ranks: dict[str, int], *, masked: bool = False) -> GrowthHistory | None:
        """The part up to the last growth that left these ranks by module; None if none did.

        Args:
            ranks: The ranks that an adapter has.
            masked: May it have more than the last event left? Then all of it, where no event left these.
        """
        if set(ranks) != set(self.modules):
            return None
        wanted = [ranks[name] for name in self.modules]
        all_of_it = len(self.steps)
        count = next((count for count in range(all_of_it, 0, -1) if self.ranks[count - 1] == wanted), 0)
        if masked and not count and all_of_it:
            more = all(has >= left for has, left in zip(wanted, self.ranks[-1], strict=True))
            count = all_of_it if more else 0
        if not count:
            return None
        return GrowthHistory(
            self.modules,
            self.budget,
            self.first_ranks,
            self.steps[:count],
            self.ranks[:count],
            self.scores[:count],
            self.step if count == all_of_it else self.steps[count],
            self.costs,
        )

    def state(self) -> dict[str, Any]:
        """For the optimizer's checkpoint."""
        return {
            "first_ranks": list(self.first_ranks),
            "steps": list(self.steps),
            "ranks": torch.tensor(self.ranks, dtype=torch.int64),
            "scores": torch.tensor(self.scores, dtype=torch.float64),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave."""
        self.first_ranks, self.steps = list(saved["first_ranks"]), list(saved["steps"])
        self.ranks, self.scores = saved["ranks"].tolist(), saved["scores"].tolist()

    def rebuild(self, rows: list[tuple[int, int, int, float]]) -> None:
        """Takes rows of step, module, rank and score of the modules that grew: what releases kept that
        did not keep all scores. ``first_ranks`` must be right."""
        for step, k, rank, score in rows:
            if not self.steps or self.steps[-1] != step:
                before = self.ranks[-1] if self.ranks else self.first_ranks
                self.add(step, list(before), [math.nan] * len(self.modules))
            self.ranks[-1][k], self.scores[-1][k] = rank, score
