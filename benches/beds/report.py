"""The table of a comparison: each arm beside uniform LoRA of the same budget, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from increlora_rs.compare.methods import Method
from increlora_rs.compare.results import Record

from ..tables import Table, number
from .arms import CEILING, REFERENCE, is_possible
from .bed import Figure
from .plan import Comparison, Plan
from .signflip import p_value

# By how many standard errors the ceiling must be ahead of uniform LoRA for a bed to say anything.
_ERRORS = 3.0
_HEADER = [
    "arm",
    "rate",
    "figure",
    "ratio",
    "wins",
    "p",
    "parameters (peak)",
    "of uniform",
    "share in planted",
    "seconds",
]


def tables(plan: Plan) -> list[Table]:
    """A table for each budget that has runs."""
    return [table for r in plan.comparison.rs if (table := _table(plan, r)).rows]


def _table(plan: Plan, r: float) -> Table:
    comparison = plan.comparison
    found = {str(arm): plan.paired(arm, r) for arm in comparison.arms if is_possible(arm, r)}
    plain = found.get(REFERENCE, {})
    notes = [
        f"Figure: mean of the {comparison.figure.name} over paired seeds, "
        f"{'higher' if comparison.figure.higher_is_better else 'lower'} is better. Ratio: its geometric mean "
        f"over {REFERENCE}'s of the same seed; wins: seeds on which the arm is better; p: exact sign-flip "
        "test."
    ]
    ceiling = next((records for name, records in found.items() if name.split(":")[0] == CEILING), {})
    notes += ceiling_note(comparison.figure, ceiling, plain)
    edges = [
        name for arm in comparison.arms if (name := str(arm)) in found and _at_edge(comparison, plan, arm, r)
    ]
    if edges:
        notes.append(f"Best rate at the edge of the grid: {', '.join(edges)}.")
    table = Table(f"{comparison.kind}, r = {r:g}", _HEADER, " ".join(notes))
    for name, records in found.items():
        if records:
            table.add(*_row(comparison.figure, name, records, plain))
    return table


def _at_edge(comparison: Comparison, plan: Plan, arm: Method, r: float) -> bool:
    best = plan.best_lr(arm, r)
    return len(comparison.lrs) > 1 and best in (min(comparison.lrs), max(comparison.lrs))


def _row(
    figure: Figure, name: str, records: Mapping[int, Record], plain: Mapping[int, Record]
) -> list[object]:
    logs = log_gains(figure, records, plain)
    first = next(iter(records.values()))
    counts = [record["parameters"] for record in records.values()]
    final, peak = (float(np.mean([count[key] for count in counts])) for key in ("final", "peak"))
    uniform = [record["parameters"]["final"] for record in plain.values()]
    compared = bool(logs) and name != REFERENCE
    return [
        name,
        f"{first['config']['lr']:g}",
        f"{mean_of(records, 'score'):.4g}",
        f"{ratio(figure, logs):.4g}" if compared else "",
        wins(logs) if compared else "",
        number(p_value(logs)) if compared else "",
        f"{final:.0f} ({peak:.0f})",
        number(final / float(np.mean(uniform))) if uniform else "",
        share(records),
        f"{mean_of(records, 'seconds'):.0f}",
    ]


def mean_of(records: Mapping[int, Record], what: str) -> float:
    """The mean of a number of the runs."""
    return float(np.mean([record[what] for record in records.values()]))


def share(records: Mapping[int, Record]) -> str:
    """The mean share of the components in planted modules; empty where none is planted."""
    shares = [record["share"] for record in records.values() if record["share"] is not None]
    return number(float(np.mean(shares))) if shares else ""


def ratio(figure: Figure, logs: Sequence[float]) -> float:
    """The geometric mean of an arm's figure over another's, of what :func:`log_gains` gave."""
    sign = 1.0 if figure.higher_is_better else -1.0
    return math.exp(sign * float(np.mean(logs)))


def wins(logs: Sequence[float]) -> str:
    """On how many of the seeds the arm is better."""
    return f"{sum(log > 0.0 for log in logs)}/{len(logs)}"


def log_gains(figure: Figure, records: Mapping[int, Record], plain: Mapping[int, Record]) -> list[float]:
    """Logarithms of how much better each seed's run is than uniform LoRA's of that seed."""
    return [
        math.log(figure.gain(records[seed]["score"], plain[seed]["score"]))
        for seed in sorted(records)
        if seed in plain
    ]


def ceiling_note(figure: Figure, ceiling: Mapping[int, Record], plain: Mapping[int, Record]) -> list[str]:
    """Whether the ceiling is ahead of uniform LoRA by enough for the bed to say where ranks belong; empty
    where there are no two seeds of both."""
    logs = log_gains(figure, ceiling, plain)
    if len(logs) < 2:
        return []
    ahead, error = float(np.mean(logs)), _standard_error(logs)
    if ahead > _ERRORS * error:
        return [f"The ceiling is ahead of uniform LoRA by {ahead / error:.1f} standard errors."]
    return [
        f"The ceiling is not ahead of uniform LoRA by {_ERRORS:g} standard errors ({ahead / error:.1f}): "
        "this bed says nothing about where ranks belong."
    ]


def _standard_error(values: Sequence[float]) -> float:
    return max(float(np.std(values, ddof=1)) / math.sqrt(len(values)), 1e-12)
