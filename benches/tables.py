"""A table that the terminal and a Markdown file both show."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.table import Table as RichTable


@dataclass
class Table:
    """Rows of cells under a header.

    Args:
        title: What it shows.
        header: Names of the columns.
        note: What a reader needs to understand the columns.
        rows: The cells.
    """

    title: str
    header: list[str]
    note: str = ""
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Appends a row; floats get three significant digits."""
        self.rows.append([number(cell) if isinstance(cell, float) else str(cell) for cell in cells])

    def markdown(self) -> str:
        """As a section of a Markdown file."""
        lines = [f"## {self.title}", ""]
        if self.note:
            lines += [self.note, ""]
        lines += ["| " + " | ".join(cells) + " |" for cells in [self.header, ["---"] * len(self.header)]]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def __rich__(self) -> RichTable:
        table = RichTable(title=self.title, caption=self.note or None)
        for name in self.header:
            table.add_column(name, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0.0 or value != value:
        return "0" if value == 0.0 else "-"
    magnitude = abs(value)
    if magnitude >= 100:
        return f"{value:.0f}"
    if magnitude >= 10:
        return f"{value:.1f}"
    if magnitude >= 1:
        return f"{value:.2f}"
    return f"{value:.3f}"
