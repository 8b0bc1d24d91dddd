"""``python -m benches``: measures, prints the tables, writes raw figures, ``RESULTS.md`` and charts."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from . import blocks, depth, floor, host, layer, machine, memory, nothing, results, scheduler, step, training
from .sizes import NAMED, Size
from .timing import QUIET, prepare, watch_others

_WIDTH = 200
_HERE = Path(__file__).parent
_PUBLISHED = {"full": _HERE, "cuda": _HERE / "cuda"}
_ELSEWHERE = _HERE.parent / "target" / "benches"
_SECTIONS: dict[str, Callable[[Size], Any]] = {
    "step": step.measure,
    "layer": layer.measure,
    "training": training.measure,
    "memory": memory.measure,
    "scheduler": scheduler.measure,
    "depth": depth.measure,
    "blocks": blocks.measure,
    "nothing": nothing.measure,
    "host": host.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    # Narrower, the tables would be columns of single letters.
    console.width = max(console.width, _WIDTH)
    if options.render is not None:
        figures = json.loads(options.render.read_text(encoding="utf-8"))
    else:
        figures = measure(options.size, options.only, options.json or _ELSEWHERE / "results.json")
    # What is less than the whole does not overwrite the published results.
    whole = set(_SECTIONS) <= set(figures)
    out = options.out or (_PUBLISHED.get(figures["size"]) if whole else None) or _ELSEWHERE
    out.mkdir(parents=True, exist_ok=True)
    if options.render is None and options.json is None:
        (out / "results.json").write_text(json.dumps(figures) + "\n", encoding="utf-8")
    for table in results.tables(figures):
        console.print(table)
    for line in results.conditions(figures):
        console.print(line, markup=False)
    for path in results.write(figures, out):
        console.print(str(path), markup=False)
    return 0


def measure(size: str, only: Sequence[str] = (), raw: Path | None = None) -> dict[str, Any]:
    """The raw figures of a run: machine, rates, and the sections ``only`` (empty: all); written to ``raw``
    after each, so that a run that is cut short leaves something."""
    prepare()
    rates = floor.measure(NAMED[size]).to_json()
    figures: dict[str, Any] = {"size": size, "machine": machine.describe(), "floor": rates, "others": {}}
    for name in _SECTIONS:
        if only and name not in only:
            continue
        # Each in a process of its own: what one leaves in memory is not there for the next.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            figures[name], others = process.submit(section, name, size).result()
        figures["others"][name] = others
        if raw is not None:
            raw.parent.mkdir(parents=True, exist_ok=True)
            raw.write_text(json.dumps(figures) + "\n", encoding="utf-8")
        if others is not None and others > QUIET:
            print(f"{name}: others took {others:.0%} of the machine's time", file=sys.stderr)
    return figures


def section(name: str, size: str) -> tuple[Any, float | None]:
    """The figures of one section, and the share of the machine's time that others took meanwhile."""
    prepare()
    with warnings.catch_warnings(), watch_others() as busy:
        # Layers timed by themselves have no scheduler, nor can they need one.
        warnings.filterwarnings("ignore", message=".*backward passes through an IncreLoRA adapter.*")
        figures = _SECTIONS[name](NAMED[size])
    return figures, busy.others


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benches", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    parser.set_defaults(size="full")
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="some 3 minutes")
    size.add_argument("--cuda", dest="size", action="store_const", const="cuda", help="on a GPU")
    size.add_argument("--smoke", dest="size", action="store_const", const="smoke", help="seconds; no figures")
    parser.add_argument(
        "--only", type=_sections, default=(), metavar="SECTION,...", help=", ".join(_SECTIONS)
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="where raw figures go")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="where RESULTS.md goes")
    parser.add_argument(
        "--render", type=Path, default=None, metavar="FILE", help="measure nothing, show FILE"
    )
    return parser


def _sections(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in _SECTIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(_SECTIONS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
