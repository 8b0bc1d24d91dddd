"""Where the ranks went, as tables: by layer and kind of module, and module by module."""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from ..saved.reading import SavedModule, read
from ..support.budget import told
from ..support.sites import in_order, places

# More kinds go down, and layers across: the experts of a mixture make hundreds.
_MOST_COLUMNS = 48


@dataclass
class RankTable:
    """Ranks by layer (rows) and kind of module (columns), or, where kinds are many, by kind and layer.
    ``print`` and rich both show it.

    Args:
        layers: The layer numbers, "-" for modules outside of layers.
        kinds: Module names without their layer.
        ranks: Rank by (layer, kind).
        budget: Total rank that the training aimed at, or number of parameters.
        parameters: Those of the components, where the budget is in parameters; else None.
    """

    layers: list[str]
    kinds: list[str]
    ranks: dict[tuple[str, str], int]
    budget: int
    parameters: int | None = None

    @classmethod
    def of(cls, ranks: dict[str, int], budget: int, parameters: int | None = None) -> RankTable:
        """The table of ranks by full module name."""
        place = places(ranks)
        kinds = list(dict.fromkeys(kind for _, kind in place.values()))
        cells = {place[name]: rank for name, rank in ranks.items()}
        return cls(in_order(layer for layer, _ in place.values()), kinds, cells, budget, parameters)

    @property
    def total_rank(self) -> int:
        """Sum of the ranks."""
        return sum(self.ranks.values())

    def __rich__(self) -> Table:
        title = f"ranks, total {told(self.total_rank, self.budget, self.parameters)}"
        if self._kinds_go_down():
            by_kind = {(kind, layer): rank for (layer, kind), rank in self.ranks.items()}
            return _crossed(title, "module", self.kinds, self.layers, by_kind)
        return _crossed(title, "layer", self.layers, self.kinds, self.ranks)

    def _kinds_go_down(self) -> bool:
        return len(self.kinds) > max(_MOST_COLUMNS, len(self.layers))

    def __str__(self) -> str:
        # Wide enough for every column at its least width: rich drops those that do not fit.
        columns = len(self.layers if self._kinds_go_down() else self.kinds)
        return _plain(self.__rich__(), max(160, 7 * columns + 30))


@dataclass
class ModuleRow:
    """One module's update dW = s B diag(E) A.

    Args:
        name: Full module name.
        shape: (out, in) of dW.
        rank: Number of components.
        norm: Frobenius norm of dW.
        singular_values: Those of dW that can differ from 0, descending: ``rank`` in number, where dW is of
            that rank.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    norm: float
    singular_values: list[float]


@dataclass
class ModuleTable:
    """A row for each module, in natural order. ``print`` and rich both show it.

    Args:
        rows: The modules.
        budget: Total rank that the training aimed at, or number of parameters.
        parameters: Those of the components, where the budget is in parameters; else None.
    """

    rows: list[ModuleRow]
    budget: int
    parameters: int | None = None

    @property
    def total_rank(self) -> int:
        """Sum of the ranks."""
        return sum(row.rank for row in self.rows)

    @property
    def norm(self) -> float:
        """Frobenius norm of all updates together."""
        return math.hypot(*(row.norm for row in self.rows))

    def share(self, spent: int) -> float:
        """So much of the budget, in its unit, in per cent of it."""
        return 100.0 * spent / self.budget

    def _spent(self, row: ModuleRow) -> int:
        """What a module's rank takes of the budget."""
        return row.rank if self.parameters is None else row.rank * (sum(row.shape) + 1)

    def __rich__(self) -> Table:
        stem = _common_stem([row.name for row in self.rows])
        table = Table(
            title=f"ranks, total {told(self.total_rank, self.budget, self.parameters)}",
            caption=f"names go on from {stem}" if stem else None,
            box=box.SIMPLE,
            show_footer=True,
            footer_style="bold",
        )
        # Only names and singular values give way where the terminal is narrow, by a line more each.
        table.add_column("module", f"{len(self.rows)} modules", overflow="fold", min_width=12)
        table.add_column("out x in", no_wrap=True, justify="right")
        table.add_column("rank", str(self.total_rank), no_wrap=True, justify="right")
        spent = sum(self._spent(row) for row in self.rows)
        table.add_column("budget", f"{self.share(spent):.1f}%", no_wrap=True, justify="right")
        table.add_column("|dW|", f"{self.norm:.3g}", no_wrap=True, justify="right")
        table.add_column("singular values", overflow="fold", min_width=8)
        for row in self.rows:
            table.add_row(
                row.name.removeprefix(stem),
                "x".join(map(str, row.shape)),
                str(row.rank),
                f"{self.share(self._spent(row)):.1f}%",
                f"{row.norm:.3g}",
                _leading(row.singular_values),
            )
        return table

    def __str__(self) -> str:
        return _plain(self.__rich__(), 100 + max(len(row.name) for row in self.rows))


def rank_table(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str], adapter_name: str = "default"
) -> RankTable:
    """Ranks of a model's adapter, or of a saved one, by layer and module.

    Raises:
        ValueError, FileNotFoundError, TypeError: as for :func:`increlora_rs.export_lora`.
    """
    adapter = read(model_or_adapter_dir, adapter_name)
    ranks = {name: module.rank for name, module in adapter.modules.items()}
    return RankTable.of(ranks, adapter.budget, adapter.parameters)


def module_table(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str], adapter_name: str = "default"
) -> ModuleTable:
    """Shape, rank, norm and singular values of each module's update, of a model or a saved adapter.

    Costs O((in + out) r^2) a module: no update is formed as a matrix that is one of a LoRA.

    Raises:
        ValueError, FileNotFoundError, TypeError: as for :func:`increlora_rs.export_lora`.
    """
    adapter = read(model_or_adapter_dir, adapter_name)
    rows = []
    for name, module in adapter.modules.items():
        values = singular_values(module)
        shape = (module.site.out, module.site.features)
        rows.append(ModuleRow(name, shape, module.rank, math.hypot(*values), values))
    return ModuleTable(rows, adapter.budget, adapter.parameters)


def singular_values(module: SavedModule) -> list[float]:
    """The singular values of the update that can differ from 0, in float64, descending."""
    factors = module.update.lora(torch.float64)
    if factors is None:
        of_all: list[float] = torch.linalg.svdvals(module.update.dense().double().cpu()).tolist()
        return of_all
    a, b = (factor.cpu() for factor in factors)
    # With B = Q R and A' = P T, Q and P orthonormal, the values are those of the small R T'.
    left = torch.linalg.qr(b, mode="r").R
    right = torch.linalg.qr(a.T, mode="r").R
    values: list[float] = torch.linalg.svdvals(left @ right.T).tolist()
    return values


def _crossed(
    title: str, first: str, rows: list[str], columns: list[str], ranks: dict[tuple[str, str], int]
) -> Table:
    table = Table(title=title)
    table.add_column(first, justify="right")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold", min_width=3)
    table.add_column("sum", justify="right", style="bold")
    for row in rows:
        cells = [ranks.get((row, column)) for column in columns]
        shown = ["" if cell is None else str(cell) for cell in cells]
        table.add_row(row, *shown, str(sum(cell or 0 for cell in cells)))
    return table


def _leading(values: list[float]) -> str:
    """The first values and the last: is every component in use?"""
    shown = [f"{value:.2g}" for value in values]
    return " ".join(shown if len(shown) <= 4 else [*shown[:3], "…", shown[-1]])


def _common_stem(names: list[str]) -> str:
    """What all names begin with, to its last dot."""
    first, last = min(names), max(names)
    end = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return first[: first.rfind(".", 0, end) + 1]


def _plain(table: Table, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False, color_system=None).print(table)
    return out.getvalue()
