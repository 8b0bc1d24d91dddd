"""The picture of a comparison at several budgets: a curve an arm, its figure against what it trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from increlora_rs.compare.methods import Method
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .arms import is_possible
from .plan import Plan

# Parameters, and mean and standard deviation of the figure over the paired seeds.
_Point = tuple[float, float, float]


def draw(plan: Plan, path: Path) -> Path | None:
    """Draws the curves; None, and nothing is drawn, where there are runs at fewer than two budgets."""
    comparison = plan.comparison
    curves = {str(arm): found for arm in comparison.arms if (found := points(plan, arm))}
    if max(map(len, curves.values()), default=0) < 2:
        return None
    figure = Figure(figsize=(6.4, 4.4), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    for k, (name, curve) in enumerate(curves.items()):
        parameters, means, deviations = np.array(curve).T
        marker = "osD^vP*X"[k % 8]
        axes.errorbar(
            parameters, means, deviations, marker=marker, markersize=4, linewidth=1, capsize=2, label=name
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if not comparison.figure.higher_is_better:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(comparison.figure.name)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)
    return path


def points(plan: Plan, arm: Method) -> list[_Point]:
    """The arm's points, a budget each, in their order."""
    found = []
    for r in sorted(plan.comparison.rs):
        records = list(plan.paired(arm, r).values()) if is_possible(arm, r) else []
        if records:
            scores = [record["score"] for record in records]
            parameters = float(np.mean([record["parameters"]["final"] for record in records]))
            found.append((parameters, float(np.mean(scores)), float(np.std(scores))))
    return found
