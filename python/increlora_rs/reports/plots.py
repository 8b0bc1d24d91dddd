"""Pictures: ranks by layer and kind of module, their growth over the steps, the scores that decided it.

Readable from one module to some hundreds: cells and letters shrink, and labels thin out, as rows and
columns become many.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from ..saved.history_file import growth_history
from ..support.budget import told
from ..support.history import GrowthHistory
from ..support.sites import in_order, places
from .tables import RankTable, rank_table

_DPI = 150
# Inches: of a heat map over the steps, and of the line that a small label takes.
_WIDTH = 6.5
_LINE = 0.11
# Points of the smallest letters that can be read.
_SMALLEST = 5.0


def plot_ranks(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    adapter_name: str = "default",
) -> None:
    """Draws the heat map of :func:`rank_table` to ``path``; its ending gives the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, FileNotFoundError, TypeError: as for :func:`increlora_rs.export_lora`.
    """
    _save(draw_ranks(rank_table(model_or_adapter_dir, adapter_name)), path)


def plot_growth(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    adapter_name: str = "default",
) -> None:
    """Draws to ``path`` how the ranks grew: every module's rank over the optimizer steps, and the total.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, FileNotFoundError, TypeError: as for :func:`increlora_rs.growth_history`.
    """
    _save(draw_growth(growth_history(model_or_adapter_dir, adapter_name)), path)


def plot_scores(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    adapter_name: str = "default",
) -> None:
    """Draws to ``path`` the score of every module at each growth, and which modules grew.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, FileNotFoundError, TypeError: as for :func:`increlora_rs.growth_history`.
    """
    _save(draw_scores(growth_history(model_or_adapter_dir, adapter_name)), path)


def draw_ranks(table: RankTable) -> Any:
    """The matplotlib figure of a table of ranks: kinds downwards, layers across."""
    rows, columns = len(table.kinds), len(table.layers)
    width, height = min(0.45, 20 / columns), min(0.4, max(20 / rows, 0.08))
    longest = max(len(kind) for kind in table.kinds)
    figure = _figure(2.2 + 0.075 * longest + width * columns, 1.6 + height * rows)
    axes = figure.add_subplot()
    largest = max(table.ranks.values())
    grid = [[table.ranks.get((layer, kind), math.nan) for layer in table.layers] for kind in table.kinds]
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=largest, aspect="auto")
    size = min(8.0, 27 * width, 44 * height)
    if size >= _SMALLEST:
        for y, kind in enumerate(table.kinds):
            for x, layer in enumerate(table.layers):
                rank = table.ranks.get((layer, kind))
                if rank is not None:
                    colour = "black" if rank > 0.6 * largest else "white"
                    axes.text(x, y, str(rank), ha="center", va="center", color=colour, fontsize=size)
    across = _every(width, 0.1 + 0.1 * max(len(layer) for layer in table.layers))
    down = _every(height, _LINE)
    axes.set_xticks(range(0, columns, across), table.layers[::across])
    axes.set_yticks(range(0, rows, down), table.kinds[::down], fontsize=min(10.0, 60 * height * down))
    axes.set_xlabel("layer")
    axes.set_title(
        f"ranks, total {told(table.total_rank, table.budget, table.parameters, 'of')}", fontsize=10
    )
    figure.colorbar(image, ax=axes, label="rank", ticks=_integers())
    return figure


def draw_growth(history: GrowthHistory) -> Any:
    """The matplotlib figure of the ranks over the steps: above what they take of the budget in all, below
    each module's."""
    rows = _Rows.of(history.modules)
    ranks = np.array([history.first_ranks, *history.ranks]).T
    edges = np.array([0, *history.steps, max(history.step, history.steps[-1] + 1)])
    figure, axes, bar, total = _over_steps(rows, above=1.2)
    in_rank = history.costs is None
    spent = ranks.sum(axis=0) if in_rank else np.array(history.costs) @ ranks
    last = int(spent[-1])
    total.stairs(spent, edges, baseline=None, color="black")
    if history.budget is not None:
        total.axhline(history.budget, color="grey", linestyle="--", linewidth=1)
    total.set_ylim(0, 1.15 * max(history.budget or 0, int(spent.max())))
    total.set_ylabel("total rank" if in_rank else "parameters")
    total.yaxis.set_major_locator(_integers(4))
    total.tick_params(labelbottom=False)
    now = int(ranks[:, -1].sum())
    words = now if history.budget is None else told(now, history.budget, None if in_rank else last, "of")
    total.set_title(f"growth of the ranks, total {words}", fontsize=10)
    image = axes.pcolormesh(edges, rows.edges, ranks[rows.order], cmap="viridis", vmin=0, vmax=ranks.max())
    total.sharex(axes)
    rows.label(axes)
    figure.colorbar(image, cax=bar, label="rank", ticks=_integers())
    return figure


def draw_scores(history: GrowthHistory) -> Any:
    """The matplotlib figure of the scores at each growth, on a logarithmic scale, a white dot where the
    module grew and a black one where it lost rank; a score stands where it was gathered, between the growth
    before and its own."""
    rows = _Rows.of(history.modules)
    scores = np.array(history.scores).T
    ranks = np.array([history.first_ranks, *history.ranks]).T
    edges = np.array([0, *history.steps])
    figure, axes, bar, _ = _over_steps(rows)
    axes.set_facecolor("lightgrey")
    positive = scores[scores > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    shown = np.ma.masked_where(~(scores > 0), scores)[rows.order]
    # A scale needs two ends, also where all scores are equal.
    ends = {"vmin": low, "vmax": high if high > low else 10 * low}
    image = axes.pcolormesh(edges, rows.edges, shown, cmap="viridis", norm="log")
    image.set_clim(**ends)
    gains = np.diff(ranks, axis=1)[rows.order]
    any_lost = bool((gains < 0).any())
    middles = (edges[:-1] + edges[1:]) / 2
    dot = min(5.0, 72 * 0.5 * min(rows.height, _WIDTH / len(history.steps)))
    lost = [(gains < 0, "black", "white")] if any_lost else []
    for found, colour, edge in [(gains > 0, "white", "black"), *lost]:
        places = np.argwhere(found)
        axes.scatter(
            middles[places[:, 1]],
            places[:, 0],
            s=dot**2,
            color=colour,
            edgecolors=edge,
            linewidths=0.15 * dot,
            zorder=3,
        )
    rows.label(axes)
    words = ", a black one: it lost rank" if any_lost else ""
    axes.set_title(f"scores at each growth; a dot: the module grew{words}; grey: no score", fontsize=10)
    figure.colorbar(image, cax=bar, label="score")
    return figure


def _over_steps(rows: _Rows, above: float = 0.0) -> tuple[Any, Any, Any, Any]:
    """A figure with axes for a heat map over the steps, for its colour bar, and, of the height ``above``
    where it is not 0, for a curve."""
    below = rows.height * len(rows.order)
    height = below + (above + 0.12 if above else 0.0)
    figure = _figure(_WIDTH, height)
    axes = figure.add_axes((0.0, 0.0, 1.0, below / height))
    axes.set_xlabel("optimizer step")
    long = min(below, 4.0)
    bar = figure.add_axes((1.03, (below - long) / height, 0.025, long / height))
    curve = figure.add_axes((0.0, 1.0 - above / height, 1.0, above / height)) if above else None
    return figure, axes, bar, curve


@dataclass
class _Rows:
    """The modules of a heat map, downwards: kind by kind, in each the layers.

    Args:
        order: For each row its module.
        layers: For each row the number of its layer.
        kinds: Each kind with its first row and the one after its last.
        height: Inches of a row.
    """

    order: list[int]
    layers: list[str]
    kinds: list[tuple[str, int, int]]
    height: float

    @classmethod
    def of(cls, modules: list[str]) -> _Rows:
        place = [places(modules)[name] for name in modules]
        rank_of = {layer: n for n, layer in enumerate(in_order(layer for layer, _ in place))}
        kinds = list(dict.fromkeys(kind for _, kind in place))
        order = sorted(range(len(place)), key=lambda k: (kinds.index(place[k][1]), rank_of[place[k][0]]))
        blocks = []
        for kind in kinds:
            rows = [row for row, k in enumerate(order) if place[k][1] == kind]
            blocks.append((kind, rows[0], rows[-1] + 1))
        return cls(
            order, [place[k][0] for k in order], blocks, min(max(0.16, 1.2 / len(order)), 12 / len(order))
        )

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """Ends of the rows on the vertical axis."""
        return np.arange(len(self.order) + 1, dtype=np.float64) - 0.5

    def label(self, axes: Any) -> None:
        """Kinds and layers on the vertical axis, and a line between kinds."""
        axes.set_ylim(len(self.order) - 0.5, -0.5)
        every = _every(self.height, 0.1)
        layered = max(end - first for _, first, end in self.kinds) > every
        ticks = [row for _, first, end in self.kinds for row in range(first, end, every)] if layered else []
        axes.set_yticks(
            ticks, [self.layers[row] for row in ticks], fontsize=min(8.0, 60 * self.height * every)
        )
        axes.tick_params(axis="y", length=2)
        last = -math.inf
        for kind, first, end in self.kinds:
            middle = (first + end - 1) / 2
            if (middle - last) * self.height >= _LINE - 1e-9:
                axes.annotate(
                    kind,
                    (0, middle),
                    (-24 if layered else -6, 0),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    fontsize=min(9.0, 60 * self.height * max(end - first, 2)),
                    annotation_clip=False,
                )
                last = middle
            if first and layered:
                axes.axhline(first - 0.5, color="white", linewidth=1)


def _every(size: float, needed: float) -> int:
    """How many cells of ``size`` inches one label takes."""
    return max(1, math.ceil(needed / size - 1e-9))


def _integers(most: int = 8) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True, min_n_ticks=1)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "increlora_rs[plot]"') from error
    return Figure(figsize=(width, height), dpi=_DPI)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    figure.savefig(path, bbox_inches="tight")
