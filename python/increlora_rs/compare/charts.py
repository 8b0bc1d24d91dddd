"""Results as pictures: the metric against the parameters, and where the ranks went."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..places import in_order, places
from .summary import Comparison, Row

_DPI = 150


def draw_charts(comparison: Comparison, folder: Path, prefix: str) -> list[Path]:
    """Writes the charts of a comparison; returns their files.

    Raises:
        ImportError: matplotlib is not installed.
    """
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
    methods = list(dict.fromkeys(row.method for row in comparison.rows))
    # The legend stands below, for methods with options have long names.
    figure = _figure(7, 4.5 + 0.18 * len(methods))
    axes = figure.add_subplot()
    for k, method in enumerate(methods):
        rows = [row for row in comparison.rows if row.method == method]
        axes.errorbar(
            [row.mean("parameters", "adapter") for row in rows],
            [100 * row.score.mean for row in rows],
            yerr=[100 * (row.score.deviation or 0.0) for row in rows],
            marker="osD^vP*X"[k % 8],
            capsize=3,
            linewidth=1,
            label=method,
        )
    axes.set_xlabel("trainable parameters of the adapter")
    axes.set_ylabel("mean of the official metrics, %")
    axes.set_title(comparison.title, fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center")
    return figure


def draw_mean_ranks(comparison: Comparison, rows: list[Row]) -> Any:
    """The matplotlib figure of mean final ranks by layer and kind of module: a heat map a row."""
    place = places(rows[0].ranks())
    layers = in_order(layer for layer, _ in place.values())
    kinds = list(dict.fromkeys(kind for _, kind in place.values()))
    height = 0.8 + 0.28 * len(kinds)
    figure = _figure(2.5 + 0.42 * len(layers), height * len(rows))
    every = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, row in zip(every, rows, strict=True):
        ranks = {place[name]: rank for name, rank in row.ranks().items()}
        grid = [[ranks.get((layer, kind), math.nan) for layer in layers] for kind in kinds]
        image = axes.imshow(grid, cmap="viridis", vmin=0, aspect="auto")
        axes.set_xticks(range(len(layers)), layers, fontsize=7)
        axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
        axes.set_title(f"{row.method}, r={row.r}, {len(row.runs)} seeds", fontsize=8)
        figure.colorbar(image, ax=axes, label="mean rank")
    every[-1].set_xlabel("layer")
    figure.suptitle(comparison.title, fontsize=9)
    return figure


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the charts need matplotlib: pip install "increlora_rs[compare]"') from error
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
