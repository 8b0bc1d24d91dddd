"""The comparison: which runs are needed, in which order, and which are there already."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..support.capacity import Capacity, labels
from .base_model import BaseModel
from .choice import best_lr, score
from .equal import Size, adapted_in, lora_of_rank_1, size_like_lora
from .memory import warm_up
from .methods import SOURCE, Method, Setting
from .results import Record, Results, run_id
from .tasks import Task
from .training import steps_of, train


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Args:
        tasks: In the order in which they are trained.
        methods: The methods.
        ranks: Average ranks.
        lrs: Learning rates that every method tries.
        seeds: Runs 0 to ``seeds - 1`` at each method's best learning rate.
        trial_seeds: The first so many of them are trained at every learning rate.
        shared: What all runs share: epochs, batch, max_length, warmup, lora_alpha, lora_dropout,
            target_modules, limit.
        equal: What the methods have equally much of: "ranks", or "parameters", as many as LoRA of the rank.
    """

    tasks: list[Task]
    methods: list[Method]
    ranks: list[float]
    lrs: list[float]
    seeds: int
    trial_seeds: int
    shared: dict[str, Any]
    equal: Literal["ranks", "parameters"] = "ranks"

    def __post_init__(self) -> None:
        if not 1 <= self.trial_seeds <= self.seeds:
            raise ValueError(
                f"--trial-seeds {self.trial_seeds} must be from 1 to the number of seeds, {self.seeds}."
            )
        if any(method.wants_ranks for method in self.methods) and SOURCE not in map(str, self.methods):
            raise ValueError(f"--methods: one starts with the final ranks of {SOURCE!r}; name that too.")
        for method in self.methods:
            for r in self.ranks:
                # Tells of wrong options now, not after the hours that other methods take.
                sized = method.sized(1)[0] if self.equal == "parameters" else {}
                method.prepare(Setting(r, 1000, 0, self.adapter, sized=sized))

    @property
    def adapter(self) -> dict[str, Any]:
        """What the configurations of all methods share."""
        return {name: self.shared[name] for name in ("lora_alpha", "lora_dropout", "target_modules")}

    @property
    def ordered_methods(self) -> list[Method]:
        """Those that need another's ranks last."""
        return sorted(self.methods, key=lambda method: method.wants_ranks)

    def steps_by_task(self) -> dict[str, int]:
        """Optimizer steps of one run of each task."""
        return {task.name: steps_of(len(task.train), self.shared) for task in self.tasks}

    def runs_of_a_method(self) -> int:
        """Runs of each method on each task at each rank."""
        return self.trial_seeds * len(self.lrs) + self.seeds - self.trial_seeds


class Session:
    """Carries a plan out and appends to the results.

    Args:
        plan: What is compared.
        base: The model.
        results: The open file.
        retry_failed: Train again what failed before.
        console: Where progress goes.
    """

    def __init__(
        self, plan: Plan, base: BaseModel, results: Results, *, retry_failed: bool, console: Console
    ) -> None:
        self._plan = plan
        self._base = base
        self._results = results
        self._retry_failed = retry_failed
        self._console = console
        self._failed = 0
        # By rank and method.
        self._sizes: dict[tuple[float, str], Size] = {}

    def prepare(self) -> None:
        """Looks at what is adapted, and chooses the sizes of the methods.

        Raises:
            ValueError: a method cannot adapt the modules.
        """
        plan = self._plan
        task, shared = plan.tasks[0], plan.shared
        model = lora_of_rank_1(self._base, task, shared["target_modules"])
        self._adapted = adapted_in(model)
        if plan.equal == "parameters":
            self._choose_sizes()
        row = self._base.tokenizer(
            [task.train[0].first] * shared["batch"],
            padding="max_length",
            truncation=True,
            max_length=shared["max_length"],
            return_tensors="pt",
        )
        warm_up(model, row, shared["precision"])

    def run(self) -> int:
        """Trains what is missing; returns how many runs of the plan failed, now or before."""
        self.prepare()
        plan, steps = self._plan, self._plan.steps_by_task()
        a_method = plan.runs_of_a_method()
        of_a_task = a_method * len(plan.methods) * len(plan.ranks)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            bar = progress.add_task("", total=sum(of_a_task * count for count in steps.values()))
            self._progress, self._bar = progress, bar
            for task in plan.tasks:
                for r in plan.ranks:
                    self._tell_capacity(task, r)
                    for method in plan.ordered_methods:
                        self._method(task, r, method)
        return self._failed

    def _choose_sizes(self) -> None:
        plan = self._plan
        for r in plan.ranks:
            for method in plan.ordered_methods:
                size = size_like_lora(method, Setting(r, 1000, 0, plan.adapter), self._adapted)
                self._sizes[r, str(method)] = size
                self._console.print(f"r={r} {method}: {size}", soft_wrap=True, highlight=False)

    def _tell_capacity(self, task: Task, r: float) -> None:
        """How far the ranks' number can matter, in a line."""
        parameters = round(r * self._adapted.of_rank_1)
        told = Capacity(parameters, labels(Counter(row.label for row in task.train)))
        self._console.print(f"{task.name} r={r}: {told}", soft_wrap=True, highlight=False)

    def _method(self, task: Task, r: float, method: Method) -> None:
        plan = self._plan
        trials = [self._one(task, r, method, lr, seed) for seed in range(plan.trial_seeds) for lr in plan.lrs]
        lr = best_lr(trials)
        for seed in range(plan.trial_seeds, plan.seeds):
            if lr is None:
                self._advance(plan.steps_by_task()[task.name])
            else:
                self._one(task, r, method, lr, seed)

    def _one(self, task: Task, r: float, method: Method, lr: float, seed: int) -> Record:
        given = self._given(task, r, seed) if method.wants_ranks else {}
        config = self._config(task, r, method, lr, seed, given)
        identity, steps = run_id(config), self._plan.steps_by_task()[task.name]
        found = self._results.find(identity)
        if found is not None and not (found["status"] == "failed" and self._retry_failed):
            self._failed += found["status"] == "failed"
            self._advance(steps)
            return found
        name = f"{task.name} r={r} {method} lr={lr:g} seed={seed}"
        self._progress.update(self._bar, description=name)
        taken = 0

        def advance() -> None:
            nonlocal taken
            taken += 1
            self._advance(1)

        record: Record = {"id": identity, "finished": "", "status": "done", "error": None, "config": config}
        try:
            if method.wants_ranks and not given:
                raise RuntimeError(f"{SOURCE} has no finished run of seed {seed} to take the ranks from")
            record |= train(method, config, task, self._base, given, advance)
            if (size := self._sizes.get((r, str(method)))) is not None:
                record["size"] = size.measured(record["parameters"])
            told = f"{score(record):.4f}, {record['seconds']:.0f} s"
        except Exception as error:
            # One method that fails must not keep the others from being trained overnight.
            record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            self._failed += 1
            told = f"failed: {record['error']}"
        record["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._results.append(record)
        self._advance(steps - taken)
        self._console.print(f"{name}: {told}", soft_wrap=True, highlight=False)
        return record

    def _advance(self, steps: int) -> None:
        self._progress.advance(self._bar, steps)

    def _config(
        self, task: Task, r: float, method: Method, lr: float, seed: int, given: dict[str, int]
    ) -> dict[str, Any]:
        steps = self._plan.steps_by_task()[task.name]
        size = self._sizes.get((r, str(method)))
        sized = {} if size is None else size.options
        setting = Setting(r, steps, seed, self._plan.adapter, sized=sized)
        return {
            "task": task.name,
            "data": task.digest,
            "model": self._base.digest,
            "method": str(method),
            "options": method.resolved(setting),
            "r": r,
            "lr": lr,
            "seed": seed,
            **self._plan.shared,
            **({"given": given} if method.wants_ranks else {}),
            **({"equal": self._plan.equal, "sized": sized} if size is not None else {}),
        }

    def _given(self, task: Task, r: float, seed: int) -> dict[str, int]:
        """Final ranks of the source's run with this seed at its best learning rate; empty without one."""
        source = next(method for method in self._plan.methods if str(method) == SOURCE)
        runs = {
            (lr, s): self._results.find(run_id(self._config(task, r, source, lr, s, {})))
            for lr in self._plan.lrs
            for s in range(self._plan.seeds)
        }
        trials = [run for (_, s), run in runs.items() if run is not None and s < self._plan.trial_seeds]
        lr = best_lr(trials)
        run = runs.get((lr, seed)) if lr is not None else None
        return run["ranks"] if run is not None and run["status"] == "done" else {}


def compare(
    plan: Plan, model: Path, out: Path, *, retry_failed: bool = False, console: Console | None = None
) -> int:
    """Trains what ``out`` does not hold yet; returns how many runs failed."""
    with Results(out) as results:
        session = Session(
            plan, BaseModel(model), results, retry_failed=retry_failed, console=console or Console()
        )
        return session.run()
