"""Which runs a comparison has: their configurations, learning rates, and who tells whom its ranks.

Every arm tries all learning rates on the tuning seeds; the best goes on to the paired seeds, which chose
nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from increlora_rs.compare.methods import Method
from increlora_rs.compare.results import Record, run_id

from .arms import CEILING, SHUFFLED, SOURCE, is_told, resolved, teller_of
from .bed import Figure
from .kinds import KINDS

# Tuning seeds begin here, far from those that are compared.
TUNING = 1000


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        kind: The bed's name.
        options: The bed's sizes.
        arms: The arms.
        rs: Budgets, as ranks of all modules.
        lrs: Learning rates that every arm tries.
        seeds: Paired runs: seeds 0 to ``seeds - 1``.
        tune_seeds: Tuning seeds.
        alpha, warmup: Of all arms; the warm-up as a share of the steps.
        source_r: Rank of the LoRA that tells the ceiling's ranks where the bed does not know them.
    """

    kind: str
    options: Any
    arms: list[Method]
    rs: list[float]
    lrs: list[float]
    seeds: int
    tune_seeds: int
    alpha: float
    warmup: float
    source_r: int

    @property
    def figure(self) -> Figure:
        """What the bed measures."""
        return KINDS[self.kind].figure

    def __post_init__(self) -> None:
        for name in ("seeds", "tune_seeds", "source_r"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be 1 or more.")
        for name in ("rs", "lrs"):
            if not all(value > 0.0 for value in getattr(self, name)):
                raise ValueError(f"--{name[:-1]} {getattr(self, name)}: give numbers above 0.")
        for arm in self.arms:
            if arm.name in SHUFFLED:
                teller_of(arm, self.arms)
            for r in self.rs:
                # Tells of wrong options now, not after the hours that other arms take.
                resolved(arm, r, self.alpha)

    @property
    def tuning(self) -> range:
        """The tuning seeds; none where there is nothing to choose."""
        return range(TUNING, TUNING + (self.tune_seeds if len(self.lrs) > 1 else 0))


class Plan:
    """A comparison, and those of its runs that are there.

    Args:
        comparison: What is compared.
        find: Gives the run of an id, or None.
    """

    def __init__(self, comparison: Comparison, find: Callable[[str], Record | None]) -> None:
        self.comparison = comparison
        self._find = find

    def best_lr(self, arm: Method, r: float) -> float | None:
        """The learning rate of the best mean over the tuning seeds; None if none ended well."""
        if len(self.comparison.lrs) == 1:
            return self.comparison.lrs[0]
        means = {}
        for lr in self.comparison.lrs:
            runs = [self.found(arm, r, lr, seed) for seed in self.comparison.tuning]
            if all(run is not None for run in runs):
                means[lr] = float(np.mean([run["score"] for run in runs if run is not None]))
        if not means:
            return None
        choose = max if self.comparison.figure.higher_is_better else min
        return choose(sorted(means), key=lambda lr: means[lr])

    def paired(self, arm: Method, r: float) -> dict[int, Record]:
        """The runs at the best learning rate, by seed."""
        lr = self.best_lr(arm, r)
        runs = (
            {}
            if lr is None
            else {seed: self.found(arm, r, lr, seed) for seed in range(self.comparison.seeds)}
        )
        return {seed: run for seed, run in runs.items() if run is not None}

    def found(self, arm: Method, r: float, lr: float, seed: int) -> Record | None:
        """The run, if it is there and ended well."""
        config = self.config(arm, r, lr, seed)
        record = None if config is None else self._find(run_id(config))
        return record if record is not None and record["status"] == "done" else None

    def config(self, arm: Method, r: float, lr: float, seed: int) -> dict[str, Any] | None:
        """All that determines a run's result; None where the run that tells its ranks is missing."""
        teller = self.teller(arm, r, seed)
        if teller is None and self.waits(arm):
            return None
        return {
            "task": self.comparison.kind,
            "bed": asdict(self.comparison.options),
            "method": str(arm),
            "arm": arm.name,
            "options": arm.options,
            "resolved": resolved(arm, r, self.comparison.alpha),
            "r": r,
            "lr": lr,
            "seed": seed,
            "alpha": self.comparison.alpha,
            "warmup": self.comparison.warmup,
            # The text bed learns the library of this version.
            "python": platform.python_version(),
            "told_by": None if teller is None else teller["id"],
        }

    def waits(self, arm: Method) -> bool:
        """Is the arm told its ranks by another run?"""
        return is_told(arm) and not (arm.name == CEILING and KINDS[self.comparison.kind].knows_ranks)

    def teller(self, arm: Method, r: float, seed: int) -> Record | None:
        """The run that tells an arm its ranks: of the same seed, at its own best learning rate."""
        if not self.waits(arm):
            return None
        if arm.name == CEILING:
            source, of_r = Method(SOURCE, {}), float(self.comparison.source_r)
        else:
            source, of_r = teller_of(arm, self.comparison.arms), r
        lr = self.best_lr(source, of_r)
        return None if lr is None else self.found(source, of_r, lr, seed)
