"""Which runs a comparison needs, in which order, and which the file of results holds already.

Every arm tries all learning rates on the tuning seeds; the best goes on to the paired seeds, which chose
nothing. Arms that are told their ranks come after those that tell them.
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from increlora_rs.compare.methods import Method
from increlora_rs.compare.results import Record, Results, run_id

from . import ranks as allot
from .arms import CEILING, OVER_ALL, SOURCE, is_possible, is_told, resolved, teller_of
from .bed import Bed, Figure
from .kinds import KINDS, bed_of
from .training import train

# Tuning seeds begin here, far from those that are compared.
TUNING = 1000
_PACKAGES = ("increlora_rs", "torch", "transformers", "peft")


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


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        config: All that determines the result.
        options: The bed's sizes.
        told: What an arm is told: final ranks of another run, or what its components do; None: nothing.
        cache: A folder for what is costly to make.
    """

    config: dict[str, Any]
    options: Any
    told: dict[str, Any] | None
    cache: Path | None


def work(job: Job) -> Record:
    """Carries a run out; what fails is told in ``error``."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = job.config
    record: Record = {"id": run_id(config), "status": "done", "error": None, "config": config}
    try:
        # Transformers' own deprecations are no news here.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        bed = bed_of(config["task"], job.options, config["seed"], job.cache)
        arm = Method(config["arm"], config["options"])
        given = told_ranks(arm, bed, config["r"], config["seed"], job.told) if is_told(arm) else {}
        names = ("r", "alpha", "lr", "warmup", "seed")
        record |= train(bed, arm, given=given, **{name: config[name] for name in names})
    except Exception as error:
        # One run that fails must not end a night's work.
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    record["versions"] = {name: version(name) for name in _PACKAGES}
    record["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return record


def told_ranks(arm: Method, bed: Bed, r: float, seed: int, told: dict[str, Any] | None) -> allot.Ranks:
    """The ranks of an arm that is told them.

    Raises:
        ValueError: nothing tells them.
    """
    if arm.name == CEILING:
        spectra = bed.spectra if told is None else told
        if spectra is None:
            raise ValueError("the bed does not know the ranks, and no trained LoRA told them.")
        return allot.cut(bed.sizes, spectra, allot.budget(bed.sizes, r))
    if told is None:
        raise ValueError(f"{arm} has no run whose final ranks it could take.")
    # The other run's ranks may lack modules that it left out.
    ranks = {name: told.get(name, 0) for name in bed.sizes}
    if arm.name == OVER_ALL:
        return allot.shuffled_over(bed.sizes, ranks, seed)
    return allot.shuffled_within(ranks, seed)


class Runs:
    """Carries a comparison out and appends to the results.

    Args:
        comparison: What is compared.
        results: The open file.
        cache: A folder for what is costly to make; None: memory alone.
        jobs: Processes.
        tell: Gets a line for every run that ends.
    """

    def __init__(
        self,
        comparison: Comparison,
        results: Results,
        cache: Path | None,
        jobs: int,
        tell: Callable[[str], None],
    ) -> None:
        self._of = comparison
        self._results = results
        self._cache = cache
        self._jobs = jobs
        self._tell = tell
        self.failed = 0

    def run(self) -> None:
        """Trains what is missing. Failed runs are tried again each time."""
        for r in self._of.rs:
            arms = [arm for arm in self._of.arms if is_possible(arm, r)]
            for arm in self._of.arms:
                if arm not in arms:
                    self._tell(f"{arm} is left out at r={r:g}: it has whole ranks only")
            self._stage([arm for arm in arms if not self._waits(arm)], r)
            if any(self._waits(arm) and arm.name == CEILING for arm in arms):
                self._stage([Method(SOURCE, {})], float(self._of.source_r))
            self._stage([arm for arm in arms if self._waits(arm)], r)

    def _stage(self, arms: Sequence[Method], r: float) -> None:
        """Arms that do not wait for each other: their tuning, then their paired runs."""
        tuning = range(TUNING, TUNING + (self._of.tune_seeds if len(self._of.lrs) > 1 else 0))
        # By seed first: the runs of a seed share its bed.
        self._all([(arm, r, lr, seed) for seed in tuning for arm in arms for lr in self._of.lrs])
        best = {str(arm): self.best_lr(arm, r) for arm in arms}
        self._all(
            [
                (arm, r, lr, seed)
                for seed in range(self._of.seeds)
                for arm in arms
                if (lr := best[str(arm)]) is not None
            ]
        )

    def best_lr(self, arm: Method, r: float) -> float | None:
        """The learning rate of the best mean over the tuning seeds; None if none ended well."""
        if len(self._of.lrs) == 1:
            return self._of.lrs[0]
        means = {}
        for lr in self._of.lrs:
            runs = [self._found(arm, r, lr, TUNING + i) for i in range(self._of.tune_seeds)]
            if all(run is not None for run in runs):
                means[lr] = float(np.mean([run["score"] for run in runs if run is not None]))
        if not means:
            return None
        choose = max if self._of.figure.higher_is_better else min
        return choose(sorted(means), key=lambda lr: means[lr])

    def paired(self, arm: Method, r: float) -> dict[int, Record]:
        """The runs at the best learning rate, by seed."""
        lr = self.best_lr(arm, r)
        runs = {} if lr is None else {seed: self._found(arm, r, lr, seed) for seed in range(self._of.seeds)}
        return {seed: run for seed, run in runs.items() if run is not None}

    def _found(self, arm: Method, r: float, lr: float, seed: int) -> Record | None:
        config = self._config(arm, r, lr, seed)
        record = None if config is None else self._results.find(run_id(config))
        return record if record is not None and record["status"] == "done" else None

    def _all(self, wanted: Sequence[tuple[Method, float, float, int]]) -> None:
        """Carries out those of the runs that the results lack."""
        found = [job for run in wanted if self._found(*run) is None and (job := self._job(*run)) is not None]
        if self._jobs == 1:
            self._keep(map(work, found))
        elif found:
            with ProcessPoolExecutor(self._jobs, mp_context=get_context("spawn")) as pool:
                self._keep(pool.map(work, found))

    def _keep(self, records: Iterable[Record]) -> None:
        for record in records:
            self._results.append(record)
            config, failed = record["config"], record["status"] == "failed"
            self.failed += failed
            told = record["error"] if failed else f"{record['score']:.4f}, {record['seconds']:.0f} s"
            name = f"{config['method']} r={config['r']:g} lr={config['lr']:g} seed={config['seed']}"
            self._tell(f"{self._of.kind} {name}: {told}")

    def _job(self, arm: Method, r: float, lr: float, seed: int) -> Job | None:
        config = self._config(arm, r, lr, seed)
        if config is None:
            return None
        teller = self._teller(arm, r, seed)
        told = None if teller is None else teller["spectra" if arm.name == CEILING else "ranks"]
        return Job(config, self._of.options, told, self._cache)

    def _config(self, arm: Method, r: float, lr: float, seed: int) -> dict[str, Any] | None:
        """All that determines a run's result; None where the run that tells its ranks is missing."""
        teller = self._teller(arm, r, seed)
        if teller is None and self._waits(arm):
            return None
        return {
            "task": self._of.kind,
            "bed": asdict(self._of.options),
            "method": str(arm),
            "arm": arm.name,
            "options": arm.options,
            "resolved": resolved(arm, r, self._of.alpha),
            "r": r,
            "lr": lr,
            "seed": seed,
            "alpha": self._of.alpha,
            "warmup": self._of.warmup,
            # The text bed learns the library of this version.
            "python": platform.python_version(),
            "told_by": None if teller is None else teller["id"],
        }

    def _waits(self, arm: Method) -> bool:
        """Is the arm told its ranks by another run?"""
        return is_told(arm) and not (arm.name == CEILING and KINDS[self._of.kind].knows_ranks)

    def _teller(self, arm: Method, r: float, seed: int) -> Record | None:
        """The run that tells an arm its ranks: of the same seed, at its own best learning rate."""
        if not self._waits(arm):
            return None
        if arm.name == CEILING:
            source, of_r = Method(SOURCE, {}), float(self._of.source_r)
        else:
            source, of_r = teller_of(arm, self._of.arms), r
        lr = self.best_lr(source, of_r)
        return None if lr is None else self._found(source, of_r, lr, seed)
