"""Tables of several comparisons: an arm's figure at each budget, and its ratios by size of the bed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from increlora_rs.compare.methods import Method
from increlora_rs.compare.results import Record

from ..tables import Table, number
from .arms import CEILING, REFERENCE, is_possible
from .plan import Plan
from .report import log_gains, mean_of, ratio, share, wins
from .signflip import p_value


def by_budget(plan: Plan) -> Table:
    """A row an arm, a column a budget: the mean figure, and in brackets its ratio to uniform LoRA's of that
    budget, the geometric mean over paired seeds."""
    rs = sorted(plan.comparison.rs)
    table = Table(plan.comparison.kind, ["arm", *(f"r = {r:g}" for r in rs)])
    lora = Method(REFERENCE, {})
    plain = {r: plan.paired(lora, r) if is_possible(lora, r) else {} for r in rs}
    for arm in plan.comparison.arms:
        cells = []
        for r in rs:
            records = plan.paired(arm, r) if is_possible(arm, r) else {}
            cells.append(_cell(plan, records, {} if arm.name == REFERENCE else plain[r]))
        table.add(str(arm), *cells)
    return table


def _cell(plan: Plan, records: Mapping[int, Record], plain: Mapping[int, Record]) -> str:
    if not records:
        return ""
    figure, mean = plan.comparison.figure, f"{mean_of(records, 'score'):.3g}"
    logs = log_gains(figure, records, plain)
    return f"{mean} ({number(ratio(figure, logs))})" if logs else mean


def by_size(plans: Sequence[Plan], told: Sequence[str]) -> Table:
    """A row a size of the bed and an arm: its ratios to uniform LoRA and to the ceiling, at the one budget.

    Args:
        plans: One of each size, with uniform LoRA, the ceiling and other arms.
        told: The names of the options that tell the sizes apart.
    """
    table = Table(
        plans[0].comparison.kind,
        ["size", "arm", "uniform", "figure", "ratio", "wins", "p", "of the ceiling", "share in planted"],
    )
    for plan in plans:
        (r,) = plan.comparison.rs
        of = {arm.name: plan.paired(arm, r) for arm in plan.comparison.arms}
        size = ", ".join(f"{name} {_said(getattr(plan.comparison.options, name))}" for name in told)
        for arm in plan.comparison.arms:
            if arm.name not in (REFERENCE, CEILING):
                table.add(size, str(arm), *_row(plan, of[arm.name], of[REFERENCE], of[CEILING]))
    return table


def _said(value: object) -> str:
    return " + ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"


def _row(
    plan: Plan, records: Mapping[int, Record], plain: Mapping[int, Record], ceiling: Mapping[int, Record]
) -> list[object]:
    figure = plan.comparison.figure
    logs, to_ceiling = log_gains(figure, records, plain), log_gains(figure, records, ceiling)
    return [
        f"{mean_of(plain, 'score'):.3g}",
        f"{mean_of(records, 'score'):.3g}",
        ratio(figure, logs),
        wins(logs),
        p_value(logs),
        ratio(figure, to_ceiling),
        share(records),
    ]
