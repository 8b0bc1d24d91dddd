"""Results as tables: a row a method, with mean and spread over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from .choice import best_lr, score
from .equal import beside
from .results import Record, run_id

# What the rows of one table differ in.
_OF_A_ROW = ("method", "options", "r", "lr", "seed", "given", "sized")
_BASELINE = "lora"
_OF_PEAK = " peak MB: what the training steps took at their peak, the model included."
_OF_SIZE = (
    " own r: the whole rank at which the method trains as many numbers as LoRA of rank r, as near as it "
    "comes; size: how many more those are than LoRA's, left at the end where ranks change until they have a "
    "budget, else trained."
)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of the sample) of some numbers; None with fewer than two."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of one value or more."""
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), deviation, len(values))

    def text(self, digits: int = 1, factor: float = 100.0) -> str:
        """``71.2 ± 0.4``."""
        shown = f"{self.mean * factor:.{digits}f}"
        return shown if self.deviation is None else f"{shown} ± {self.deviation * factor:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """One method at one rank, at its best learning rate.

    Args:
        method: With its options.
        r: Average rank.
        lr: The learning rate.
        tried: Learning rates that it was tried with.
        runs: Those at the learning rate, a run a seed, by seed.
        failed: Runs that failed, at any learning rate.
    """

    method: str
    r: int | float
    lr: float
    tried: list[float]
    runs: dict[int, Record]
    failed: int

    def of(self, part: str, metric: str) -> Spread:
        """Spread of a metric of ``part``: "dev" after the last epoch, or "test"."""
        return Spread.of(
            [(run["epochs"][-1] if part == "dev" else run["test"])[metric] for run in self.runs.values()]
        )

    @property
    def score(self) -> Spread:
        """Spread of the mean of the official metrics on the development set."""
        return Spread.of([score(run) for run in self.runs.values()])

    @property
    def loss(self) -> Spread | None:
        """Spread of the loss on the development set after the last epoch; None where a run lacks it."""
        losses = [run["losses"][-1] for run in self.runs.values() if run.get("losses")]
        return Spread.of(losses) if len(losses) == len(self.runs) else None

    def mean(self, *path: str) -> float:
        """Mean of a number of the runs, such as ``parameters``, ``adapter``."""
        values = []
        for run in self.runs.values():
            value: Any = run
            for key in path:
                value = value[key]
            values.append(value)
        return float(np.mean(values))

    @property
    def own_r(self) -> float:
        """The rank that makes the method as large as LoRA of rank ``r``; ``r`` where that is the rank."""
        own: float = next(iter(self.runs.values()))["config"].get("sized", {}).get("r", self.r)
        return own

    @property
    def size(self) -> str:
        """How much larger it is than LoRA: ``+0.1 %``; empty where that was not the aim."""
        sizes = [run["size"] for run in self.runs.values() if "size" in run]
        return beside(sum(s["own"] for s in sizes), sum(s["lora"] for s in sizes)) if sizes else ""

    @property
    def peak(self) -> float | None:
        """Mean of what a training added to the memory at its peak, in MB; None where no run tells it."""
        peaks = [run["peak_bytes"] for run in self.runs.values() if run.get("peak_bytes") is not None]
        return float(np.mean(peaks)) / 1e6 if peaks else None

    def ranks(self) -> dict[str, float]:
        """Mean final rank by module."""
        every = [run["ranks"] for run in self.runs.values()]
        return {name: float(np.mean([ranks[name] for ranks in every])) for name in every[0]}


@dataclass(frozen=True)
class Comparison:
    """What can be compared: the rows of one task, trained alike.

    Args:
        task: Its name.
        setting: What all runs share.
        rows: By rank, and in the order in which the methods were trained.
    """

    task: str
    setting: dict[str, Any]
    rows: list[Row]

    @property
    def title(self) -> str:
        """The task and what all runs share."""
        return self.describe(self.task)

    def describe(self, tasks: str) -> str:
        """``tasks`` and what all runs share."""
        s = self.setting
        limited = "" if s["limit"] is None else f", {s['limit']} rows at most"
        dropout = "" if s["base_dropout"] is None else f", dropout {s['base_dropout']:g} in the base"
        return (
            f"{tasks}: {s['epochs']} epochs of batches of {s['batch']}, {s['max_length']} tokens, "
            f"{s['precision']}{dropout}{limited}{', equal parameters' if self.is_equal else ''}"
        )

    @property
    def is_equal(self) -> bool:
        """Are the methods of one size?"""
        return bool(self.setting.get("equal") == "parameters")

    @property
    def stem(self) -> str:
        """For names of files: the task, and what tells settings apart."""
        return f"{self.task}-{run_id(self.setting)[:4]}"

    def difference(self, row: Row) -> Spread | None:
        """Spread of the score less plain LoRA's of the same rank and seed; None for LoRA itself, and where
        no seed has both."""
        return difference_of(self.baseline(row), row, "dev")

    def baseline(self, row: Row) -> Row | None:
        """Plain LoRA of the same rank; None for LoRA itself, and where it was not trained."""
        base = next((other for other in self.rows if (other.method, other.r) == (_BASELINE, row.r)), None)
        return None if base is row else base

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table, as text. Metrics are in per cent."""
        first = next(iter(self.rows[0].runs.values()))
        metrics = list(first["epochs"][-1])
        tests = metrics if first["test"] else []
        has_peak = any(row.peak is not None for row in self.rows)
        header = [
            "method",
            "r",
            *(["own r", "size"] if self.is_equal else []),
            "lr",
            "seeds",
            "left",
            "trained",
            "rank",
            *metrics,
            *[f"test {m}" for m in tests],
            "dev loss",
        ]
        header += ["vs LoRA", "s/step", *(["peak MB"] if has_peak else []), "failed"]
        rows = []
        for row in self.rows:
            difference = self.difference(row)
            rows.append(
                [
                    row.method,
                    str(row.r),
                    *([str(row.own_r), row.size] if self.is_equal else []),
                    f"{row.lr:g} of {len(row.tried)}",
                    str(len(row.runs)),
                    f"{row.mean('parameters', 'adapter'):,.0f}",
                    f"{row.mean('parameters', 'held'):,.0f}",
                    f"{row.mean('total_rank'):.0f}",
                    *[row.of("dev", metric).text() for metric in metrics],
                    *[row.of("test", metric).text() for metric in tests],
                    "" if row.loss is None else row.loss.text(3, 1.0),
                    "" if difference is None else difference.text(),
                    f"{row.mean('seconds_a_step'):.3f}",
                    *(["" if row.peak is None else f"{row.peak:,.0f}"] if has_peak else []),
                    str(row.failed),
                ]
            )
        return header, rows

    @property
    def caption(self) -> str:
        """What the columns mean."""
        heads = sorted({run["parameters"]["head"] for row in self.rows for run in row.runs.values()})
        return (
            "Mean ± standard deviation over the seeds, in per cent, after the last epoch, at the learning "
            "rate that was best on the development set with the trial seeds, out of so many. Parameters of "
            f"the adapter, without the {' or '.join(f'{head:,}' for head in heads)} of the classifier: those "
            "left at the end, and those trained until then. vs LoRA: mean of the official metrics less "
            f"LoRA's, seed by seed.{_OF_PEAK if any(row.peak is not None for row in self.rows) else ''}"
            f"{_OF_SIZE if self.is_equal else ''}"
        )

    def __rich__(self) -> Table:
        return rich_table(self.title, self.caption, *self.cells())

    def markdown(self) -> str:
        """The table in Markdown."""
        return f"### {self.title}\n\n{markdown_table(*self.cells())}\n\n{self.caption}\n"


def difference_of(base: Row | None, row: Row, part: str) -> Spread | None:
    """Spread of the mean of the official metrics less ``base``'s, seed by seed; None without ``base``, a
    common seed, or a test set where ``part`` is "test"."""
    if base is None:
        return None
    pairs = [(base.runs[seed], row.runs[seed]) for seed in sorted(base.runs.keys() & row.runs.keys())]
    if not pairs or (part == "test" and not pairs[0][0]["test"]):
        return None
    return Spread.of([score(run, part) - score(other, part) for other, run in pairs])


def rich_table(title: str, caption: str, header: list[str], rows: list[list[str]]) -> Table:
    """A table for the terminal, whose first column is text and whose others are numbers."""
    table = Table(title=title, caption=caption, box=box.SIMPLE)
    for k, name in enumerate(header):
        # Only names give way where the terminal is narrow.
        table.add_column(name, justify="right" if k else "left", overflow="fold", no_wrap=k > 0)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """The same in Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summarise(records: Sequence[Record]) -> list[Comparison]:
    """The comparisons that results hold; methods of which no run ended well are left out.

    Raises:
        ValueError: no run ended well.
    """
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(run_id(_setting(record)), []).append(record)
    comparisons = []
    for runs in grouped.values():
        rows = _rows(runs)
        if rows:
            comparisons.append(Comparison(runs[0]["config"]["task"], _setting(runs[0]), rows))
    if not comparisons:
        raise ValueError(f"--out: of the {len(records)} runs in it none ended well; see their 'error'.")
    return comparisons


def _setting(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record["config"].items() if name not in _OF_A_ROW}


def _rows(records: list[Record]) -> list[Row]:
    grouped: dict[tuple[int, str], list[Record]] = {}
    for record, label in zip(records, _labels(records), strict=True):
        grouped.setdefault((record["config"]["r"], label), []).append(record)
    rows = []
    for (r, label), runs in sorted(grouped.items(), key=lambda item: item[0][0]):
        lr = best_lr(runs)
        if lr is None:
            continue
        own = {
            run["config"]["seed"]: run
            for run in runs
            if run["status"] == "done" and run["config"]["lr"] == lr
        }
        tried = sorted({run["config"]["lr"] for run in runs})
        failed = sum(run["status"] == "failed" for run in runs)
        rows.append(Row(label, r, lr, tried, dict(sorted(own.items())), failed))
    return rows


def _labels(records: list[Record]) -> list[str]:
    """The method of each run; where releases of different defaults have trained it, with what differs."""
    # Some options follow from the rank.
    by_method: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for record in records:
        config = record["config"]
        by_method.setdefault((config["method"], config["r"]), []).append(config["options"])
    labels = []
    for record in records:
        method, options = record["config"]["method"], record["config"]["options"]
        every = by_method[method, record["config"]["r"]]
        differ = [name for name in options if any(other.get(name) != options[name] for other in every)]
        with_these = ", ".join(f"{name}={options[name]}" for name in differ)
        labels.append(f"{method} ({with_these})" if differ else method)
    return labels
