"""Ranks that move: every module begins as in LoRA, and components go from where they do little to where they
do much.

What a component does is judged by how its first-order effect on the loss fluctuates from step to step:

    p = <s b E a^T, G> = E dL/dE over its root mean square over all components of the step,
    worth = running mean of (p - running mean of p)^2

A first move is a trial: a few components go, and nothing else does until it is known what they turned out to
be worth; and so on from move to move. Where what came is not worth enough more than what left, ranks stay
where they are: all of them are needed alike, and what a component does fluctuates for other reasons.

A step in which no token comes to an expert tells nothing of its components: their running means are those of
the steps that they took part in, and what took part in fewer than some is not judged.

Where training has settled, the mean of p says nothing, for what pulls a component up and down is in balance,
and its variance is dW^T F dW with F the covariance of the gradients: Fisher's approximation of the curvature,
so to second order what the loss would gain if the component were taken away.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ... import _core
from ...contract.policy import AdaptedModule, Event, Plan, Step
from ...support.warning import warn
from .allocation import Allocation
from .config import IncreLoraConfig
from .idle import Idle
from .schedule import caps_of
from .verdict import Verdict

logger = logging.getLogger(__name__)

_Vector = npt.NDArray[np.float64]

# The running mean of p is over some ten steps: it follows what training changes, and leaves what batches do.
_RATE = 0.1
# What an interval between events leaves of the mean square.
_KEPT = 0.4
# Of an automatic schedule: the first event, as a share of the steps; events, at most, of which about every
# third moves something; steps between two, at least.
_FIRST, _EVENTS, _INTERVAL = 0.1, 26, 5
# The part of the budget that may move at the trial, and at an event.
_TRIAL, _SHARE = 0.1, 0.2
# How many times as much as what leaves for it a component has to be expected to be worth.
_MARGIN = 3.0
# Intervals between events until a component that came is judged, and until it speaks for its module: what
# still learns is worth less than it will be, so a module would seem to have had enough when it got some.
_JUDGED, _GROWN = 3, 6
# Steps that a component has to have taken part in to be judged, where it may be idle: an expert's.
_LEAST_SEEN = 5


@dataclass(frozen=True)
class MoveSchedule:
    """When ranks move: at the multiples of ``deltaT`` from ``tinit`` to ``end``, in optimizer steps."""

    tinit: int
    deltaT: int
    end: int

    @classmethod
    def of(cls, config: IncreLoraConfig, total_steps: int | None) -> MoveSchedule:
        """What the configuration leaves open is chosen for so many steps.

        Raises:
            ValueError: the number of steps is not known.
        """
        if total_steps is None:
            raise ValueError(
                "total_steps=None: ranks move until a share of the steps (growth_end), so their number must "
                "be known; give attach(..., total_steps=...) or set total_step in IncreLoraConfig."
            )
        end = int(total_steps * config.last_growth)
        tinit = int(total_steps * _FIRST) if config.tinit is None else config.tinit
        # A training of a few steps has an event, too.
        least = min(_INTERVAL, max((end - tinit) // 3, 1))
        interval = config.deltaT or max((end - tinit) // (_EVENTS - 1), least)
        made = cls(tinit, interval, end)
        if made.next_event(1) > end:
            warn(
                f"no step from tinit={tinit} to {end} (growth_end={config.last_growth} of {total_steps}) "
                f"is a multiple of deltaT={interval}, so no rank will move. Train longer, or lower deltaT or "
                "tinit."
            )
        return made

    def is_event(self, step: int) -> bool:
        """Do ranks move after this step?"""
        return self.tinit <= step <= self.end and step % self.deltaT == 0

    def next_event(self, step: int) -> int:
        """The first event at or after ``step``; after ``end`` there is none."""
        return -(-max(step, self.tinit, 1) // self.deltaT) * self.deltaT

    @property
    def middle(self) -> int:
        """By here what is over the budget has left."""
        return (self.tinit + self.end) // 2


class Moves(Allocation):
    """Components that go where they do most; their total is the budget.

    Args:
        modules, config, plan: As for :class:`Allocation`.

    Attributes:
        schedule: When ranks move (``tinit``, ``deltaT``, ``end``).
        verdict: Does it pay?

    Raises:
        ValueError: the number of steps is not known.
    """

    def __init__(self, modules: Sequence[AdaptedModule], config: IncreLoraConfig, plan: Plan) -> None:
        super().__init__(modules, config, plan)
        self.schedule = MoveSchedule.of(config, plan.total_steps)
        self._effects = _core.Fluctuation([module.factors[-1] for module in modules])
        self._first_spent = 0
        self._scores = np.zeros(len(modules))
        self._idle = Idle(modules)
        self.verdict = Verdict()
        self._begin()

    def start(self) -> None:
        """Notes what the components take at first, which may be more than the budget."""
        self._first_spent = self.spent

    def decides(self, number: int) -> bool:
        """At the events of the schedule."""
        return self.schedule.is_event(number)

    def before_step(self, step: Step) -> None:
        """The regulariser, and newborn rows as they are."""
        self._orthogonality.before_step(step)
        self.warmup.keep_old()

    def after_step(self, step: Step) -> Event | None:
        """Corrects newborn rows, takes the step's effects in; moves, where the schedule says so."""
        number, schedule = step.number, self.schedule
        self.warmup.correct(step)
        if number > schedule.end:
            return None
        self._observe()
        return self._move(number) if self.decides(number) else None

    def resized(self) -> None:
        """Looks anew which rows are newborn; of ranks that were loaded nothing is known yet."""
        self.warmup.find_young(self.modules)
        if self._ranks != self.ranks():
            self._begin()

    def logs(self) -> dict[str, float]:
        """The regulariser's value, and what came over what left (:class:`Verdict`), once that is known."""
        ratio = self.verdict.ratio
        return super().logs() | ({} if ratio is None else {"moved_worth": ratio})

    def scores(self) -> _Vector:
        """What the components of each module were worth in all at the last event."""
        return self._scores

    def finish(self) -> None:
        """Drops what moving needs."""
        self.warmup.find_young(())

    def _begin(self) -> None:
        """Nothing is known of any component."""
        self._ranks = self.ranks()
        self._mean, self._squares, self._steps = (
            torch.zeros(sum(self._ranks), dtype=torch.float64, device=self.plan.device) for _ in range(3)
        )

    def _observe(self) -> None:
        """Takes the step's effects in, of components that took part."""
        known = self._mean, self._squares, self._steps
        took_part = self._idle.took_part() if self._idle else None
        before = [] if took_part is None else [vector.clone() for vector in known]
        self._effects.observe_(
            *known, mean_rate=_RATE, square_rate=1.0 - _KEPT ** (1.0 / self.schedule.deltaT)
        )
        if took_part is not None:
            ranks = torch.tensor(self._ranks, device=took_part.device)
            seen = took_part.repeat_interleave(ranks, output_size=len(self._mean))
            for vector, old in zip(known, before, strict=True):
                vector.copy_(torch.where(seen, vector, old))

    # Moving.

    def _move(self, number: int) -> Event | None:
        worth, ranks = self._squares.cpu().numpy(), self._ranks
        starts = np.concatenate([[0], np.cumsum(ranks)])
        self._scores = np.array([worth[i:j].sum() for i, j in itertools.pairwise(starts)])
        births, seen = self._births(), self._seen_enough()
        shares = self._for_each_parameter(worth)
        self._judge(number, shares, births, seen)
        removed, gained = _core.choose_moves(
            worth,
            seen & ((births == 0) | self._is_older(births, _JUDGED, number)),
            seen & ((births == 0) | self._is_older(births, _GROWN, number)),
            of_all := np.array(ranks, dtype=np.uint64),
            caps_of(self.config, self.modules, of_all),
            np.array(self._in_budget.costs, dtype=np.uint64),
            budget=self._allowed(number),
            most=self._most(),
            margin=_MARGIN,
        )
        if not removed and not any(gained):
            return None
        leaving = np.zeros(len(worth), dtype=bool)
        leaving[removed] = True
        if removed and any(gained):
            # What left for the budget alone is worth less than what left for others.
            self.verdict.moved(number, np.sort(shares[leaving])[-sum(gained) :])
        lost = worth[leaving].sum() / max(worth.sum(), np.finfo(np.float64).tiny)
        stay = [np.flatnonzero(~leaving[i:j]).tolist() for i, j in itertools.pairwise(starts)]
        changed = [k for k, kept in enumerate(stay) if len(kept) < ranks[k] or gained[k]]
        for k in changed:
            if len(stay[k]) < ranks[k]:
                self.modules[k].shrink(stay[k])
            if gained[k]:
                self.modules[k].grow(gained[k], self.generator(number, k, "grow"))
        self._carry(stay, gained)
        return Event(
            changed=changed,
            scores=self._scores,
            line=f"{len(removed)} components left, worth {100 * lost:.1f} % of all, {sum(gained)} came, "
            f"total rank {self._in_budget.told(self._ranks, 'of')}",
        )

    def _allowed(self, number: int) -> int:
        """What the components may take after an event: where they began above the budget, they come down to
        it in equal steps until the middle."""
        over, schedule = self._first_spent - self.budget, self.schedule
        if over <= 0 or number >= schedule.middle:
            return self.budget
        return self.budget + int(
            over * (schedule.middle - number) / (schedule.middle - schedule.tinit + schedule.deltaT)
        )

    def _seen_enough(self) -> npt.NDArray[np.bool_]:
        """Which components took part in steps enough to be judged."""
        seen: npt.NDArray[np.bool_] = self._steps.cpu().numpy() >= _LEAST_SEEN
        may_be_idle = np.zeros(len(self.modules), dtype=bool)
        may_be_idle[self._idle.may_be] = True
        return seen | ~np.repeat(may_be_idle, self._ranks)

    def _judge(
        self, number: int, worth: _Vector, births: npt.NDArray[np.int64], seen: npt.NDArray[np.bool_]
    ) -> None:
        """Judges what came and had time to learn; told, where it turns out not to pay."""
        verdict, before = self.verdict, self.verdict.pays
        for event in [event for event in verdict.waiting if self._is_older(event, _JUDGED, number)]:
            verdict.judge(event, worth[seen], births[seen])
        if verdict.pays is False and before is not False:
            logger.info(
                "step %d: what came is worth %.2g times what left for it: ranks stay where they are",
                number,
                verdict.ratio,
            )

    def _most(self) -> int:
        """What may move: a trial first, the next when what came is judged, nothing any more where it does not
        pay."""
        pays = self.verdict.pays
        if self.verdict.waiting or pays is False:
            return 0
        return max(int((_SHARE if pays else _TRIAL) * self.budget), 1)

    def _births(self) -> npt.NDArray[np.int64]:
        return np.array([birth for module in self.modules for birth in module.births[-1]], dtype=np.int64)

    def _is_older(self, birth: Any, intervals: int, number: int) -> Any:
        """Was it born so many intervals ago, or earlier?"""
        return number - birth >= intervals * self.schedule.deltaT

    def _for_each_parameter(self, worth: _Vector) -> _Vector:
        """What components are worth for each parameter, over the mean of all."""
        costs = np.repeat(np.array(self._in_budget.costs, dtype=np.float64), self._ranks)
        each = worth / costs
        mean = worth.sum() / max(costs.sum(), 1.0)
        return each / mean if mean > 0.0 else each

    def _carry(self, stay: list[list[int]], gained: list[int]) -> None:
        """What is known of the components that stay; of new ones nothing is."""
        places, start = [], 0
        for kept, rank, new in zip(stay, self._ranks, gained, strict=True):
            places += [start + 1 + place for place in kept] + [0] * new
            start += rank
        index = torch.tensor(places, dtype=torch.int64, device=self._mean.device)
        zero = self._mean.new_zeros(1)
        self._mean, self._squares, self._steps = (
            torch.cat([zero, vector])[index] for vector in (self._mean, self._squares, self._steps)
        )
        self._ranks = [len(kept) + new for kept, new in zip(stay, gained, strict=True)]

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Budget, schedule, and what is known of the components."""
        schedule = self.schedule
        return {
            **self._planned(),
            "schedule": [schedule.tinit, schedule.deltaT, schedule.end],
            "was_linear": self.warmup.was_linear,
            "first_spent": self._first_spent,
            "ranks": self._ranks,
            "scores": torch.from_numpy(self._scores.copy()),
            "verdict": self.verdict.state(),
            "fluctuation": [vector.clone() for vector in (self._mean, self._squares, self._steps)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on by the schedule that was planned, within the configuration's budget; told where that is
        another.

        Raises:
            ValueError: the run was planned by another importance, so its ranks grow and do not move.
        """
        if "fluctuation" not in state:
            raise ValueError(
                f"importance='fluctuation', but the run that is resumed had {state.get('importance')!r}, by "
                f"which ranks grow: set importance={state.get('importance')!r} to go on with it."
            )
        planned, own = MoveSchedule(*state["schedule"]), self.schedule
        end = None if self.config.growth_end is None else own.end
        self._tell_differences(
            state,
            "from the next event on they keep to the new one",
            "ranks go on moving by that plan",
            [
                ("tinit", self.config.tinit, planned.tinit),
                ("deltaT", self.config.deltaT, planned.deltaT),
                ("the last step of growth_end", end, planned.end),
            ],
        )
        self.schedule = planned
        self.warmup.was_linear = state["was_linear"]
        self._first_spent, self._ranks = state["first_spent"], list(state["ranks"])
        self._scores = state["scores"].cpu().numpy()
        self.verdict.restore(state["verdict"])
        self._mean, self._squares, self._steps = (
            vector.to(self.plan.device, copy=True) for vector in state["fluctuation"]
        )
