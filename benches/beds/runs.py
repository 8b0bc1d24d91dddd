"""Carries a comparison out: what the file of results lacks is trained, and appended to it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from increlora_rs.compare.methods import Method
from increlora_rs.compare.results import Record, Results, run_id

from . import ranks as allot
from .arms import CEILING, OVER_ALL, SOURCE, is_possible, is_told
from .bed import Bed
from .kinds import bed_of
from .plan import Comparison, Plan
from .training import train

_PACKAGES = ("increlora_rs", "torch", "transformers", "peft")
# An arm at a budget, with a learning rate and a seed.
_Run = tuple[Method, float, float, int]


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


_CarryOut = Callable[[Sequence[Job]], Iterable[Record]]


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

    Attributes:
        failed: How many runs failed.
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
        self._plan = Plan(comparison, results.find)
        self._results = results
        self._cache = cache
        self._jobs = jobs
        self._tell = tell
        self.failed = 0

    def run(self) -> None:
        """Trains what is missing, arms that are told their ranks after those that tell them. Failed runs are
        tried again each time."""
        if self._jobs == 1:
            self._stages(lambda jobs: map(work, jobs))
            return
        with ProcessPoolExecutor(self._jobs, mp_context=get_context("spawn")) as pool:
            self._stages(
                lambda jobs: (
                    done.result() for done in as_completed([pool.submit(work, job) for job in jobs])
                )
            )

    def _stages(self, carry_out: _CarryOut) -> None:
        for r in self._of.rs:
            arms = [arm for arm in self._of.arms if is_possible(arm, r)]
            for arm in self._of.arms:
                if arm not in arms:
                    self._tell(f"{arm} is left out at r={r:g}: it has whole ranks only")
            self._stage([arm for arm in arms if not self._plan.waits(arm)], r, carry_out)
            if any(self._plan.waits(arm) and arm.name == CEILING for arm in arms):
                self._stage([Method(SOURCE, {})], float(self._of.source_r), carry_out)
            self._stage([arm for arm in arms if self._plan.waits(arm)], r, carry_out)

    def _stage(self, arms: Sequence[Method], r: float, carry_out: _CarryOut) -> None:
        """Arms that do not wait for each other: their tuning, then their paired runs."""
        # By seed first: the runs of a seed share its bed.
        self._all(
            [(arm, r, lr, seed) for seed in self._of.tuning for arm in arms for lr in self._of.lrs], carry_out
        )
        chosen = [(arm, lr) for arm in arms if (lr := self._plan.best_lr(arm, r)) is not None]
        self._all([(arm, r, lr, seed) for seed in range(self._of.seeds) for arm, lr in chosen], carry_out)

    def _all(self, wanted: Sequence[_Run], carry_out: _CarryOut) -> None:
        """Carries out those of the runs that the results lack."""
        missing = [run for run in wanted if self._plan.found(*run) is None]
        jobs = [job for run in missing if (job := self._job(*run)) is not None]
        for record in carry_out(jobs):
            self._results.append(record)
            config, failed = record["config"], record["status"] == "failed"
            self.failed += failed
            told = record["error"] if failed else f"{record['score']:.4f}, {record['seconds']:.0f} s"
            name = f"{config['method']} r={config['r']:g} lr={config['lr']:g} seed={config['seed']}"
            self._tell(f"{self._of.kind} {name}: {told}")

    def _job(self, arm: Method, r: float, lr: float, seed: int) -> Job | None:
        config = self._plan.config(arm, r, lr, seed)
        if config is None:
            return None
        teller = self._plan.teller(arm, r, seed)
        told = None if teller is None else teller["spectra" if arm.name == CEILING else "ranks"]
        return Job(config, self._of.options, told, self._cache)
