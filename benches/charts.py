"""The charts: what the adapters add, how cost grows with tokens, and with modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from . import floor
from .floor import ELEMENT, Rates
from .methods import ADALORA, FROZEN, LITERAL, LORA, METHODS, OURS
from .scheduler import FORMS, STATES
from .sizes import NAMED
from .tables import number
from .timing import median, overhead

_COLOURS = {FROZEN: "0.45", LORA: "#3b75af", ADALORA: "#8c6bb1", LITERAL: "#c44e52", OURS: "#e08214"}
_STATE_COLOURS = dict(zip(STATES, ("0.45", "#3b75af", "#5aae61", "#8c6bb1", "#e08214"), strict=True))


def draw(figures: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draws what was measured; gives each picture's path by its caption."""
    drawn = {}
    if "step" in figures:
        drawn["what the adapters add to the frozen model"] = _overhead(figures, folder / "overhead.png")
    if "layer" in figures:
        drawn["cost of an adapted layer by tokens"] = _tokens(figures, folder / "tokens.png")
    if "scheduler" in figures:
        drawn["cost of the scheduler by modules"] = _scheduler(figures, folder / "scheduler.png")
    return drawn


def _panels(count: int, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * count, height), dpi=130, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, axes: list[Axes], path: Path) -> Path:
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path)
    return path


def _plain_ticks(panel: Axes) -> None:
    """Numbers instead of powers of ten on the logarithmic axis of values, and no more than fit."""
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _overhead(figures: Mapping[str, Any], path: Path) -> Path:
    records, size = figures["step"]["passes"], NAMED[figures["size"]]
    rates = Rates.from_json(figures["floor"])
    precisions = list(dict.fromkeys(record["precision"] for record in records))
    figure, axes = _panels(len(precisions))
    methods = [method for method in METHODS if method != FROZEN]
    width = 0.8 / len(methods)
    for panel, precision in zip(axes, precisions, strict=True):
        mine = [record for record in records if record["precision"] == precision]
        element = ELEMENT[precision]
        for k, method in enumerate(methods):
            places = [i + (k - (len(methods) - 1) / 2) * width for i in range(len(mine))]
            values = [overhead(record["ms"], method) for record in mine]
            drawn = panel.bar(places, values, width * 0.92, color=_COLOURS[method], label=method)
            panel.bar_label(drawn, fmt=number, fontsize=7)
        for i, record in enumerate(mine):
            tokens, dropout = size.batch * size.tokens, record["dropout"]
            least = sum(
                rates.milliseconds(floor.adapter(shape, tokens, size.rank, dropout, element), element)
                for shape in floor.layers_of_step(size)
            )
            label = "floor" if i == 0 else ""
            panel.hlines(least, i - 0.45, i + 0.45, color="black", linestyle="--", linewidth=1, label=label)
        frozen = median(mine[0]["ms"][FROZEN])
        panel.set_title(f"{precision} (frozen: {number(frozen)} ms)", fontsize=10)
        panel.set_xticks(range(len(mine)), [f"dropout {record['dropout']:g}" for record in mine])
    axes[0].set_ylabel("ms over the frozen model")
    return _save(figure, axes, path)


def _tokens(figures: Mapping[str, Any], path: Path) -> Path:
    shape = figures["layer"][0]["shape"]
    rank = figures["layer"][0]["rank"]
    dropout = max(record["dropout"] for record in figures["layer"])
    chosen = [
        record
        for record in figures["layer"]
        if (record["shape"], record["rank"], record["dropout"]) == (shape, rank, dropout)
    ]
    precisions = list(dict.fromkeys(record["precision"] for record in chosen))
    figure, axes = _panels(len(precisions))
    for panel, precision in zip(axes, precisions, strict=True):
        mine = sorted(
            (record for record in chosen if record["precision"] == precision), key=lambda r: r["tokens"]
        )
        for method in METHODS:
            known = [record for record in mine if method in record["ms"]]
            tokens = [record["tokens"] for record in known]
            values = [median(record["ms"][method]) for record in known]
            panel.plot(tokens, values, "o-", color=_COLOURS[method], label=method, markersize=4)
        tokens = [record["tokens"] for record in mine]
        panel.set_xscale("log", base=2)
        _plain_ticks(panel)
        panel.set_xticks(tokens, [str(count) for count in tokens])
        panel.set_xlabel("tokens")
        panel.set_title(precision, fontsize=10)
    axes[0].set_ylabel("ms, forward and backward")
    figure.suptitle(f"layer {shape[0]} to {shape[1]}, rank {rank}, dropout {dropout:g}", fontsize=11)
    return _save(figure, axes, path)


def _scheduler(figures: Mapping[str, Any], path: Path) -> Path:
    figure, axes = _panels(len(FORMS))
    for panel, form in zip(axes, FORMS, strict=True):
        mine = [record for record in figures["scheduler"] if record["form"] == form]
        modules = [record["modules"] for record in mine]
        plain = [median(record["plain"]) for record in mine]
        panel.plot(modules, plain, "k--", linewidth=1, label="optimizer.step() itself")
        for state in STATES:
            if not all(record["hooks"][state] for record in mine):
                # Ranks that move have no window in which an importance is armed.
                continue
            values = [median(record["hooks"][state]) for record in mine]
            panel.plot(modules, values, "o-", color=_STATE_COLOURS[state], label=state, markersize=4)
        panel.set_xscale("log")
        _plain_ticks(panel)
        panel.set_xticks(modules, [str(count) for count in modules])
        panel.minorticks_off()
        panel.set_xlabel("adapted modules")
        panel.set_title(f"{form} form", fontsize=10)
    axes[0].set_ylabel("ms of the hooks in optimizer.step()")
    return _save(figure, axes, path)
