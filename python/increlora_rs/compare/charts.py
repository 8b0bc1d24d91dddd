"""Results as pictures: the metric against the parameters, or beside what it costs, and where ranks went."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from ..support.sites import in_order, places
from .overview import Overview
from .summary import Comparison, Row

_DPI = 150


def draw_charts(comparison: Comparison, folder: Path, prefix: str) -> list[Path]:
    """Writes the charts of a comparison; returns their files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if comparison.is_equal:
        drawn = {"costs": draw_costs(comparison)}
    else:
        drawn = {"parameters": draw_parameters(comparison)}
    adaptive = [row for row in comparison.rows if len(set(row.ranks().values())) > 1]
    if adaptive:
        drawn["ranks"] = draw_mean_ranks(comparison, adaptive)
    files = []
    for name, figure in drawn.items():
        files.append(folder / f"{prefix}-{comparison.stem}-{name}.png")
        figure.savefig(files[-1], bbox_inches="tight")
    return files


def draw_parameters(comparison: Comparison) -> Any:
    """The matplotlib figure of the mean official metric, with its standard deviation, against the adapter's
    parameters: a line a method, a point a rank."""
    return _parameters([comparison], comparison.title)


def draw_overview(overview: Overview) -> Any:
    """The same of several tasks, a panel each; of methods of one size the metric alone."""
    draw = _scores_by_task if overview.comparisons[0].is_equal else _parameters
    return draw(overview.comparisons, overview.title)


def _parameters(comparisons: list[Comparison], title: str) -> Any:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    methods = list(dict.fromkeys(row.method for c in comparisons for row in c.rows))
    across = min(3, len(comparisons))
    down = math.ceil(len(comparisons) / across)
    # The legend stands below, for methods with options have long names.
    figure = _figure(max(7, 3.5 * across), 0.5 + (3 if down > 1 else 4) * down + 0.18 * len(methods))
    panels = _panels(figure, down, across, len(comparisons))
    for axes, comparison in zip(panels, comparisons, strict=True):
        for k, method in enumerate(methods):
            rows = [row for row in comparison.rows if row.method == method]
            axes.errorbar(
                [row.mean("parameters", "adapter") / 1000 for row in rows],
                [100 * row.score.mean for row in rows],
                yerr=[100 * (row.score.deviation or 0.0) for row in rows],
                color=f"C{k % 10}",
                marker="osD^vP*X"[k % 8],
                capsize=3,
                linewidth=1,
                label=method,
            )
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda thousands, _: f"{thousands:,g}"))
        axes.tick_params(labelsize=8)
        if len(comparisons) > 1:
            axes.set_title(comparison.task, fontsize=9)
    for axes in panels[-across:]:
        axes.set_xlabel("trainable parameters, in thousands", fontsize=8)
    figure.supylabel("mean of the official metrics, %", fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center")
    return figure


def draw_costs(comparison: Comparison) -> Any:
    """The matplotlib figure of methods of one size: the mean official metric with its standard deviation, the
    seconds of a step, and the memory at the peak where it is known; a line a method, dashed LoRA's score."""
    rows = comparison.rows
    costs = {"seconds a step": [row.mean("seconds_a_step") for row in rows]}
    if any(row.peak is not None for row in rows):
        costs["peak memory, MB"] = [math.nan if row.peak is None else row.peak for row in rows]
    lines = _lines([comparison])
    figure = _figure(4.5 + 2 * len(costs), 1.2 + 0.26 * len(rows))
    scores, *panels = figure.subplots(1, 1 + len(costs), sharey=True, width_ratios=[1.4, *[1] * len(costs)])
    _draw_scores(scores, comparison, lines)
    scores.set_xlabel("mean of the official metrics, %", fontsize=8)
    for axes, (name, values) in zip(panels, costs.items(), strict=True):
        bars = axes.barh(range(len(rows)), values, color=[_colour(lines, row) for row in rows], height=0.6)
        shown = ["" if math.isnan(value) else f"{value:,.3g}" for value in values]
        axes.bar_label(bars, shown, fontsize=7, padding=2)
        # Room for the numbers.
        axes.margins(x=0.25)
        axes.tick_params(labelsize=8)
        axes.set_xlabel(name, fontsize=8)
    figure.suptitle(textwrap.fill(comparison.title, 90), fontsize=9)
    return figure


def _scores_by_task(comparisons: list[Comparison], title: str) -> Any:
    """Methods of one size on several tasks: a panel a task, a line a method."""
    lines = _lines(comparisons)
    across = min(3, len(comparisons))
    down = math.ceil(len(comparisons) / across)
    figure = _figure(1.5 + 2.6 * across, 0.8 + (0.5 + 0.22 * len(lines)) * down)
    panels = _panels(figure, down, across, len(comparisons))
    for k, (axes, comparison) in enumerate(zip(panels, comparisons, strict=True)):
        _draw_scores(axes, comparison, lines)
        axes.set_title(comparison.task, fontsize=9)
        axes.tick_params(labelleft=k % across == 0)
    figure.supxlabel("mean of the official metrics, %", fontsize=9)
    figure.suptitle(textwrap.fill(title, 90), fontsize=9)
    return figure


_Line = tuple[str, float]


def _lines(comparisons: list[Comparison]) -> list[_Line]:
    return list(dict.fromkeys((row.method, row.r) for c in comparisons for row in c.rows))


def _colour(lines: list[_Line], row: Row) -> str:
    methods = list(dict.fromkeys(method for method, _ in lines))
    return f"C{methods.index(row.method) % 10}"


def _draw_scores(axes: Any, comparison: Comparison, lines: list[_Line]) -> None:
    for row in comparison.rows:
        axes.errorbar(
            100 * row.score.mean,
            lines.index((row.method, row.r)),
            xerr=100 * (row.score.deviation or 0.0),
            color=_colour(lines, row),
            marker="o",
            capsize=3,
        )
        base = comparison.baseline(row)
        if base is not None:
            axes.axvline(100 * base.score.mean, color="0.7", linestyle="--", linewidth=0.8, zorder=0)
    several = len({r for _, r in lines}) > 1
    axes.set_yticks(range(len(lines)), [f"{method}, r={r}" if several else method for method, r in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(labelsize=8)


def draw_mean_ranks(comparison: Comparison, rows: list[Row]) -> Any:
    """The matplotlib figure of mean final ranks by layer and kind of module: a heat map a row."""
    place = places(rows[0].ranks())
    layers = in_order(layer for layer, _ in place.values())
    kinds = list(dict.fromkeys(kind for _, kind in place.values()))
    across = min(2, len(rows))
    down = math.ceil(len(rows) / across)
    width, height = 2.5 + 0.42 * len(layers), 0.8 + 0.28 * len(kinds)
    figure = _figure(width * across, height * down)
    panels = _panels(figure, down, across, len(rows))
    for axes, row in zip(panels, rows, strict=True):
        ranks = {place[name]: rank for name, rank in row.ranks().items()}
        grid = [[ranks.get((layer, kind), math.nan) for layer in layers] for kind in kinds]
        image = axes.imshow(grid, cmap="viridis", vmin=0, aspect="auto")
        axes.set_xticks(range(len(layers)), layers, fontsize=7)
        axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
        axes.set_title(f"{row.method}, r={row.r}, {len(row.runs)} seeds", fontsize=8)
        bar = figure.colorbar(image, ax=axes)
        bar.set_label("mean rank", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    for axes in panels[-across:]:
        axes.set_xlabel("layer", fontsize=8)
    figure.suptitle(comparison.title, fontsize=9)
    return figure


def _panels(figure: Any, down: int, across: int, count: int) -> list[Any]:
    """Axes in rows, as many as are needed; the last row may be shorter."""
    every = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in every[count:]:
        axes.remove()
    return every[:count]


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the charts need matplotlib: pip install "increlora_rs[compare]"') from error
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
