"""Where the ranks went: a table and a heat map by layer and module."""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from .source import Adapter, read

_OUTSIDE = "-"
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass
class RankTable:
    """Ranks by layer (rows) and kind of module (columns). ``print`` and rich both show it.

    Args:
        layers: Names of the rows: the layer numbers, "-" for modules outside of layers.
        kinds: Names of the columns: module names without their layer.
        ranks: Rank by (layer, kind).
        budget: Total rank that the training aimed at.
    """

    layers: list[str]
    kinds: list[str]
    ranks: dict[tuple[str, str], int]
    budget: int

    @property
    def total_rank(self) -> int:
        """Sum of the ranks."""
        return sum(self.ranks.values())

    def __rich__(self) -> Table:
        table = Table(title=f"ranks, total {self.total_rank} of a budget of {self.budget}")
        table.add_column("layer", justify="right")
        for kind in self.kinds:
            table.add_column(kind, justify="right", overflow="fold", min_width=3)
        table.add_column("sum", justify="right", style="bold")
        for layer in self.layers:
            cells = [self.ranks.get((layer, kind)) for kind in self.kinds]
            shown = ["" if cell is None else str(cell) for cell in cells]
            table.add_row(layer, *shown, str(sum(cell or 0 for cell in cells)))
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        # Wide enough for every column at its least width: rich drops those that do not fit.
        width = max(160, 7 * len(self.kinds) + 30)
        Console(file=out, width=width, force_terminal=False, color_system=None).print(self.__rich__())
        return out.getvalue()


def rank_table(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str], adapter_name: str = "default"
) -> RankTable:
    """Ranks of a model's adapter, or of a saved one, by layer and module.

    Raises:
        ValueError, FileNotFoundError, TypeError: as for :func:`increlora_rs.export_lora`.
    """
    return _table(read(model_or_adapter_dir, adapter_name))


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
    table = rank_table(model_or_adapter_dir, adapter_name)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot_ranks needs matplotlib: pip install "increlora_rs[plot]"') from error
    rows, columns = len(table.kinds), len(table.layers)
    longest = max(len(kind) for kind in table.kinds)
    figure = Figure(figsize=(2.2 + 0.075 * longest + 0.45 * columns, 1.6 + 0.4 * rows), dpi=150)
    axes: Any = figure.add_subplot()
    largest = max(table.ranks.values())
    grid = [[table.ranks.get((layer, kind), float("nan")) for layer in table.layers] for kind in table.kinds]
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=largest, aspect="auto")
    for y, kind in enumerate(table.kinds):
        for x, layer in enumerate(table.layers):
            rank = table.ranks.get((layer, kind))
            if rank is not None:
                colour = "black" if rank > 0.6 * largest else "white"
                axes.text(x, y, str(rank), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(columns), table.layers)
    axes.set_yticks(range(rows), table.kinds)
    axes.set_xlabel("layer")
    axes.set_title(f"ranks, total {table.total_rank} of {table.budget}", fontsize=10)
    figure.colorbar(image, ax=axes, label="rank")
    figure.savefig(path, bbox_inches="tight")


def _table(adapter: Adapter) -> RankTable:
    places = {name: _place(name) for name in adapter.modules}
    if len(set(places.values())) < len(places):
        # Two stacks of layers, an encoder's and a decoder's: the stack's name tells them apart.
        places = {name: _place(name, with_stack=True) for name in adapter.modules}
    short = _shortest([kind for _, kind in places.values()])
    layers: dict[str, None] = {}
    ranks = {}
    for name, (layer, kind) in places.items():
        layers[layer] = None
        ranks[layer, short[kind]] = adapter.modules[name].rank
    numbers = sorted((layer for layer in layers if layer != _OUTSIDE), key=int)
    budget = adapter.config.r * len(adapter.modules)
    if _OUTSIDE in layers:
        numbers.append(_OUTSIDE)
    return RankTable(numbers, list(short.values()), ranks, budget)


def _place(name: str, with_stack: bool = False) -> tuple[str, str]:
    """A module's layer number ("-" outside of layers) and its name within the layer, if wished with the
    name of the stack of layers."""
    found = _LAYER.search(f".{name}.")
    if found is None:
        return _OUTSIDE, name
    inside = f".{name}."[found.end() :].strip(".")
    if with_stack or not inside:
        inside = f"{name[: max(found.start() - 1, 0)]}.{inside}".strip(".")
    return found.group(1), inside or name


def _shortest(kinds: list[str]) -> dict[str, str]:
    """Each name's shortest ending that no other name has, e.g. ``query`` for ``attention.self.query``."""
    short = {}
    distinct = list(dict.fromkeys(kinds))
    for kind in distinct:
        parts = kind.split(".")
        endings = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for other in distinct if other != kind]
        unique = (e for e in endings if not any(other.endswith(f".{e}") for other in others))
        short[kind] = next(unique, kind)
    return short
