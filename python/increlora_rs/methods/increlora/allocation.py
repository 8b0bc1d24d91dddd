"""What allocating ranks within a budget has in common, whether they grow or move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...contract.policy import AdaptedModule, Plan, Policy
from ...support.budget import amount
from ...support.warning import warn
from ..orthogonality import Orthogonality
from ..smoothing import Smoothing
from .config import IncreLoraConfig
from .restart import RestartWarmup
from .schedule import budget_of


class Allocation(Policy):
    """A budget of ranks, the regulariser, and the restart warm-up of new components.

    Args:
        modules, config, plan: As for :class:`Policy`.
        smoothing: What is smoothed along with the regulariser; None: nothing.

    Attributes:
        budget: What the ranks may take in all.
        warmup: The restart warm-up of new components.
    """

    budget: int

    def __init__(
        self,
        modules: Sequence[AdaptedModule],
        config: IncreLoraConfig,
        plan: Plan,
        smoothing: Smoothing | None = None,
    ) -> None:
        super().__init__(modules, config, plan)
        self._in_budget = budget_of(config, modules)
        self.budget = self._in_budget.total
        self.costs = None if self._in_budget.unit == "rank" else self._in_budget.costs
        self.warmup = RestartWarmup(plan, enabled=config.restart_warmup)
        self._orthogonality = Orthogonality(modules, config.orthogonality_weight, smoothing)

    @property
    def spent(self) -> int:
        """What the ranks take of ``budget``, in its unit."""
        return self._in_budget.spent(self.ranks())

    @property
    def orth_reg(self) -> float:
        """Value of the orthogonality regulariser now, without its weight (eq. 4)."""
        # A sum of nothing may be -0.0.
        return abs(float(self._orthogonality.value()))

    def logs(self) -> dict[str, float]:
        """The regulariser's value, also where its weight is 0."""
        return {"orth_reg": self.orth_reg}

    def _planned(self) -> dict[str, Any]:
        """Of the state that is saved, what :meth:`_tell_differences` looks at."""
        return {"budget": self.budget, "budget_unit": self._in_budget.unit}

    def _tell_differences(
        self, state: dict[str, Any], of_budget: str, of_schedule: str, given: Iterable[tuple[str, Any, Any]]
    ) -> None:
        """Tells where the configuration has another plan than the run that is resumed.

        Args:
            state: The saved one.
            of_budget, of_schedule: What then happens.
            given: Arguments of the schedule, each with its value, None where it was left out, and that of the
                run that is resumed.
        """
        budget, planned = self._in_budget, (state["budget"], state["budget_unit"])
        if planned != (budget.total, budget.unit):
            warn(
                f"r={self.config.r} makes a budget of {budget}, but the run that is resumed was planned for "
                f"{amount(*planned)}: {of_budget}"
            )
        for name, value, had in given:
            if value is not None and value != had:
                warn(f"{name}={value}, but the run that is resumed was planned with {had}: {of_schedule}")
