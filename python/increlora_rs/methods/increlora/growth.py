"""IncreLoRA's policy: which modules grow, when, and by what (sections 3.2 and 3.3 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...contract.policy import AdaptedModule, Event, Plan, Step
from ...support.warning import warn
from . import unreached
from .allocation import Allocation
from .config import IncreLoraConfig
from .gradient import GradientScores
from .schedule import caps_of, new_schedule, ranks_of, schedule_of
from .scores import Scores
from .sensitivity import SensitivityScores

_Vector = npt.NDArray[np.float64]


class Growth(Allocation):
    """Ranks that grow at the events of a schedule until a budget is spent.

    Args:
        modules, config, plan: As for :class:`Allocation`.
        choose_by: Gives the scores that growths choose by, finite and at least 0, from those that were
            measured, a value a module, alike in every process: for controls and experiments, as a choice by
            lot. None: those that were measured.

    Attributes:
        schedule: When and how much the ranks grow (``tinit``, ``deltaT``, ``top_h``, ``add_r``).

    Raises:
        ValueError: the number of steps is not known but needed; ``importance="fluctuation"``, by which ranks
            do not grow.
    """

    def __init__(
        self,
        modules: Sequence[AdaptedModule],
        config: IncreLoraConfig,
        plan: Plan,
        *,
        choose_by: Callable[[_Vector], _Vector] | None = None,
    ) -> None:
        self._scores: Scores = _scores_of(config)(modules, config)
        super().__init__(modules, config, plan, self._scores.smoothing)
        self._choose_by = choose_by
        self.gauge = self._scores.gauge
        self._may_grow = False
        # Is no component there, so that a loss has a gradient by what is measured alone?
        self._nothing_there = False
        # Were modules that no gradient reaches looked for? Once, at the first growth.
        self._told_unreached = False

    def start(self) -> None:
        """Makes the schedule, told where it may fall short, and the first components in reserve.

        Raises:
            ValueError: no module has a component, and by the sensitivity none is chosen then.
        """
        steps = self.plan.total_steps
        if self.config.importance == "sensitivity" and not any(self.ranks()):
            raise ValueError(
                "importance='sensitivity': a module without components has no sensitivity, and no module has "
                f"one: rank_pattern={self.config.rank_pattern} makes every rank 0. Give some rank 1 or more, "
                "or set importance='gradient'."
            )
        self.schedule = new_schedule(self.config, self.modules, steps, self._in_budget)
        self._scores.start(self.plan.seed, self.schedule.add_r)
        self._update_may_grow(self.ranks())
        self._fill_reserves(0, range(len(self.modules)))

    def wants(self, number: int) -> bool:
        """Will a growth need the importance of this step, or the loss a gradient?"""
        return self._may_grow and (self._nothing_there or self._in_window(number))

    def decides(self, number: int) -> bool:
        """At the events of the schedule, while ranks may grow."""
        return self._may_grow and self.schedule.is_event(number)

    def _in_window(self, number: int) -> bool:
        return self._scores.wanted(self.schedule.next_event(number) - number)

    def before_step(self, step: Step) -> None:
        """The regulariser, the importances of the step, and newborn rows as they are."""
        if step.armed and self._nothing_there and not self._in_window(step.number):
            # Asked for only to give the loss a gradient.
            self._scores.gauge.total.zero_()
            step = step._replace(armed=False)
        self._scores.before_smoothing(step)
        self._orthogonality.before_step(step)
        self._scores.before_step(step)
        self.warmup.keep_old()

    def after_step(self, step: Step) -> Event | None:
        """Corrects newborn rows; grows, where the schedule says so."""
        self.warmup.correct(step)
        if not self.decides(step.number):
            return None
        return self._grow(step.number)

    def resized(self) -> None:
        """Looks anew what may grow, and which rows are newborn."""
        self._update_may_grow(self.ranks())
        self.warmup.find_young(self.modules)

    def scores(self) -> _Vector:
        """The scores of now; by the gradient those of the last growth."""
        return self._scores.values()

    def finish(self) -> None:
        """Drops the components in reserve, and what growth needs."""
        self.warmup.find_young(())
        self._scores.finish()
        self._drop_reserves()

    # Growth.

    def _grow(self, number: int) -> Event:
        reached = self._scores.reached(self.plan.optimizer)
        scores = self._scores.at_growth()
        if self._choose_by is not None:
            scores = self._choose_by(scores)
        if not scores.any():
            warn(
                f"step {number}: the importance of every module is 0, so the first modules in model order "
                "grow. Did the adapter take part in the loss?"
            )
        if not self._told_unreached:
            self._told_unreached = True
            unreached.tell(number, self.modules, reached)
        ranks = ranks_of(self.modules)
        caps = caps_of(self.config, self.modules, ranks)
        chosen = unreached.choose(self.schedule, scores, ranks, caps, self._in_budget.total, reached)
        for k, components in chosen:
            self.modules[k].grow(
                components, self.generator(number, k, "grow"), self._scores.directions(k, components)
            )
        self._scores.after_growth()
        grown = self.ranks()
        self._update_may_grow(grown)
        if self._may_grow:
            self._fill_reserves(number, (k for k, _ in chosen))
        else:
            self._drop_reserves()
        return Event(
            changed=[k for k, _ in chosen],
            scores=scores,
            line=f"{len(chosen)} modules grew, total rank {self._in_budget.told(grown, 'of')}",
            warning=self._short_of_budget(grown),
        )

    def _short_of_budget(self, ranks: list[int]) -> str | None:
        # What is left of a budget in parameters may pay for no component of those with room.
        if self._in_budget.spent(ranks) >= self._in_budget.total or any(self._room(ranks)):
            return None
        return (
            f"no module can grow any more, but the total rank is {self._in_budget.told(ranks)}: "
            f"every module is at max_r={self.config.max_r} or at min(in, out). Raise max_r, adapt more "
            "modules, or lower r."
        )

    def _update_may_grow(self, ranks: list[int]) -> None:
        """Can ranks still grow from these?"""
        left = self._in_budget.total - self._in_budget.spent(ranks)
        pairs = zip(self._in_budget.costs, self._room(ranks), strict=True)
        self._may_grow = any(cost <= left for cost, has in pairs if has)
        self._nothing_there = not any(ranks) and not self.config.uses_reserve

    def _room(self, ranks: list[int]) -> list[bool]:
        """Which modules would be below the largest rank that they may have?"""
        of_all = np.array(ranks, dtype=np.uint64)
        below: list[bool] = (of_all < caps_of(self.config, self.modules, of_all)).tolist()
        return below

    def _fill_reserves(self, number: int, indices: Iterable[int]) -> None:
        if not self.config.uses_reserve or not self._may_grow:
            return
        of_all = list(indices)
        modules = [self.modules[k] for k in of_all]
        ranks = ranks_of(modules)
        rooms = caps_of(self.config, modules, ranks) - ranks
        for k, module, room in zip(of_all, modules, rooms.tolist(), strict=True):
            module.set_reserve(min(self.schedule.add_r, room), self.generator(number, k, "reserve"))

    def _drop_reserves(self) -> None:
        for module in self.modules:
            if module.rows > module.rank:
                module.set_reserve(0)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Budget, schedule, scores, and the components in reserve."""
        schedule = self.schedule
        return {
            **self._planned(),
            "schedule": [schedule.tinit, schedule.deltaT, schedule.top_h, schedule.add_r],
            "was_linear": self.warmup.was_linear,
            "told_unreached": self._told_unreached,
            "importance": self.config.importance,
            "scores": self._scores.state(),
            "ranks": self.ranks(),
            "reserve": [m.structure.in_reserve(m.layer, m.adapter) for m in self.modules],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on by the schedule that was planned; told where the configuration has another.

        Raises:
            ValueError: the run was planned for ranks that move.
        """
        if "fluctuation" in state:
            raise ValueError(
                f"importance={self.config.importance!r}, but the run that is resumed had "
                "'fluctuation', by which ranks move: set importance='fluctuation' to go on with it."
            )
        wanted = self.config.tinit, self.config.deltaT, self.config.top_h
        self._tell_differences(
            state,
            "ranks go on growing by that plan, which may not reach it",
            "ranks go on growing by that plan",
            zip(("tinit", "deltaT", "top_h"), wanted, state["schedule"], strict=False),
        )
        if state["importance"] != self.config.importance:
            warn(
                f"importance={self.config.importance!r}, but the run that is resumed had "
                f"{state['importance']!r}: the scores start anew. Set importance={state['importance']!r} to "
                "go on as before."
            )
        steps = self.plan.total_steps
        self.schedule = schedule_of(self.config, self.modules, steps, self._in_budget, state["schedule"])
        self.warmup.was_linear = state["was_linear"]
        self._told_unreached = state["told_unreached"]
        self._scores.start(self.plan.seed, self.schedule.add_r)
        if state["importance"] == self.config.importance:
            self._scores.restore(state["scores"])
        for module, rank, reserve in zip(self.modules, state["ranks"], state["reserve"], strict=True):
            # A saved adapter has no reserve; a state_dict of the model does.
            if module.rank == rank == module.rows:
                module.structure.add_reserve(module.layer, module.adapter, *reserve)
        # Those of the model may come after the optimizer's state, and a backward pass before the next look.
        self._update_may_grow(state["ranks"])


def _scores_of(config: IncreLoraConfig) -> type[Scores]:
    if config.importance == "fluctuation":
        raise ValueError(
            "importance='fluctuation': ranks move by it, and Growth lets them grow; set "
            "importance='gradient' or 'sensitivity'."
        )
    return GradientScores if config.importance == "gradient" else SensitivityScores
