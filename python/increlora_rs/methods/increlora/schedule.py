"""The schedule of one training: from the configuration and the modules, and told if it falls short."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ... import _core
from ...contract.policy import AdaptedModule
from ...support.budget import Budget, amount
from ...support.warning import warn
from .config import IncreLoraConfig

# Steps of a training whose length is not known, and rank that no module reaches.
_ENDLESS = 2**62


def ranks_of(modules: Sequence[AdaptedModule]) -> npt.NDArray[np.uint64]:
    """Active ranks."""
    return np.array([module.rank for module in modules], dtype=np.uint64)


def caps_of(
    config: IncreLoraConfig, modules: Sequence[AdaptedModule], ranks: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """The largest rank that each module, now of these ``ranks``, may have."""
    most = config.max_r or _ENDLESS
    caps = [min(most, module.layer.largest_rank) for module in modules]
    return np.maximum(np.array(caps, dtype=np.uint64), ranks)


def budget_of(config: IncreLoraConfig, modules: Sequence[AdaptedModule]) -> Budget:
    """What the ranks of the modules may take in all."""
    return config.budget([(module.layer.out_features, module.layer.in_features) for module in modules], ())


def new_schedule(
    config: IncreLoraConfig, modules: Sequence[AdaptedModule], total_steps: int | None, budget: Budget
) -> _core.Schedule:
    """A schedule that spends ``budget``; told, with the numbers, where it may not.

    Raises:
        ValueError: the number of steps is not known but needed.
    """
    if total_steps is None and None in (config.tinit, config.deltaT, config.top_h):
        raise ValueError(
            "total_steps=None: the schedule is left to the library, which needs the number of optimizer "
            "steps; give attach(..., total_steps=...) or set total_step in IncreLoraConfig."
        )
    wish = (config.tinit, config.deltaT, config.top_h, config.add_r)
    schedule = schedule_of(config, modules, total_steps, budget, wish)
    ranks = ranks_of(modules)
    start, most = (budget.spent(each.tolist()) for each in (ranks, caps_of(config, modules, ranks)))
    told = None
    if start > budget.total:
        told = (
            f"the ranks add up to {amount(start, budget.unit)} already, more than the budget of "
            f"{budget.total} that r={config.r} gives {len(modules)} modules: none will grow. Raise r, or "
            "lower rank_pattern."
        )
    elif most < budget.total:
        told = (
            f"the budget cannot be reached: {len(modules)} modules at an average rank of r={config.r} make "
            f"{budget}, but their sizes and max_r={config.max_r} allow {most}. Lower r, adapt more modules, "
            "or raise max_r."
        )
    elif schedule.reached < budget.total:
        steps = "" if total_steps is None else f" in {total_steps} steps"
        told = (
            f"the budget {'cannot' if schedule.possible < budget.total else 'may not'} be reached: "
            f"{len(modules)} modules at an average rank of r={config.r} make {budget}, but from {start} only "
            f"{schedule.reached} are sure to be reached{steps} with {schedule}. Train longer, raise top_h or "
            "add_r, lower deltaT or tinit, or lower r."
        )
    elif schedule.last > schedule.end and (config.deltaT is None) != (config.top_h is None):
        given = f"deltaT={config.deltaT}" if config.top_h is None else f"top_h={config.top_h}"
        told = (
            f"growth_end={config.last_growth} is step {schedule.end} of {total_steps}, but {given} makes "
            f"growth go on to step {schedule.last}: {schedule}. Set growth_end along with it, or leave it "
            "out."
        )
    if told is not None:
        warn(told)
    return schedule


def schedule_of(
    config: IncreLoraConfig,
    modules: Sequence[AdaptedModule],
    total_steps: int | None,
    budget: Budget,
    wish: tuple[int | None, int | None, int | None, int],
) -> _core.Schedule:
    """The schedule with the values of ``wish`` (tinit, deltaT, top_h, add_r); None is left open."""
    tinit, interval, top_h, add_r = wish
    ranks = ranks_of(modules)
    return _core.Schedule(
        total_steps or _ENDLESS,
        ranks,
        caps_of(config, modules, ranks),
        budget.total,
        tinit=tinit,
        deltaT=interval,
        top_h=top_h,
        add_r=add_r,
        growth_end=config.last_growth,
        costs=np.array(budget.costs, dtype=np.uint64),
    )
