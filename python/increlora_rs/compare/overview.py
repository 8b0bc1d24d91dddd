"""Results of several tasks in one table: a row a method, a column a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from .results import run_id
from .summary import Comparison, Row, Spread, difference_of, markdown_table, rich_table

_CAPTION = (
    "Mean ± standard deviation over the seeds of the mean of a task's official metrics on the development "
    "set, in per cent; [n] where only n seeds were trained. vs LoRA: the mean over the tasks of the "
    "difference to LoRA, seed by seed, ± its standard error; on the test sets likewise, where tasks have one."
)


@dataclass(frozen=True)
class Overview:
    """Comparisons of different tasks that were trained alike.

    Args:
        comparisons: One a task.
    """

    comparisons: list[Comparison]

    @property
    def title(self) -> str:
        """The tasks and what all runs share."""
        return self.comparisons[0].describe(", ".join(c.task for c in self.comparisons))

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table, as text. Metrics are in per cent."""
        found = [{(row.method, row.r): row for row in c.rows} for c in self.comparisons]
        header = ["method", "r", *[c.task for c in self.comparisons], "vs LoRA", "test vs LoRA"]
        most = max(len(row.runs) for rows_of_a_task in found for row in rows_of_a_task.values())
        rows = []
        for method, r in dict.fromkeys(key for rows_of_a_task in found for key in rows_of_a_task):
            own = [rows_of_a_task.get((method, r)) for rows_of_a_task in found]
            rows.append(
                [
                    method,
                    str(r),
                    *["" if row is None else _cell(row, most) for row in own],
                    self._difference(own, "dev"),
                    self._difference(own, "test"),
                ]
            )
        return header, rows

    def _difference(self, rows: Sequence[Row | None], part: str) -> str:
        spreads = [
            difference_of(comparison.baseline(row), row, part)
            for comparison, row in zip(self.comparisons, rows, strict=True)
            if row is not None
        ]
        return mean_difference([spread for spread in spreads if spread is not None])

    def __rich__(self) -> Table:
        return rich_table(self.title, _CAPTION, *self.cells())

    def markdown(self) -> str:
        """The table in Markdown."""
        return f"### {self.title}\n\n{markdown_table(*self.cells())}\n\n{_CAPTION}\n"


def _cell(row: Row, most: int) -> str:
    """The score, with the number of seeds where others have more."""
    count = len(row.runs)
    return row.score.text() if count == most else f"{row.score.text()} [{count}]"


def mean_difference(spreads: Sequence[Spread]) -> str:
    """``-0.4 ± 0.2``: the mean of some means in per cent with its standard error, which is left out where
    one of them has a single seed; empty of none."""
    if not spreads:
        return ""
    mean = 100 * float(np.mean([spread.mean for spread in spreads]))
    deviations = [spread.deviation for spread in spreads]
    if None in deviations:
        return f"{mean:+.1f}"
    variances = [(spread.deviation or 0.0) ** 2 / spread.count for spread in spreads]
    return f"{mean:+.1f} ± {100 * np.sqrt(np.sum(variances)) / len(spreads):.1f}"


def overviews(comparisons: Sequence[Comparison]) -> list[Overview]:
    """Those of two tasks or more."""
    grouped: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        alike = {k: v for k, v in comparison.setting.items() if k not in ("task", "data")}
        grouped.setdefault(run_id(alike), []).append(comparison)
    return [Overview(every) for every in grouped.values() if len(every) > 1]
