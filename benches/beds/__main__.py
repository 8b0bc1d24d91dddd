"""``python -m benches.beds BED``: trains what is missing, prints the table, writes it beside the results,
with a picture where there are several budgets."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from increlora_rs.compare.methods import parse_methods
from increlora_rs.compare.results import Results, read_results
from rich.console import Console

from . import __doc__ as _about
from .arms import names
from .curve import draw
from .kinds import KINDS
from .plan import Comparison, Plan
from .report import tables
from .runs import Runs

_ARMS = "lora,lora-qv,lora-mlp,increlora,sensitivity,ceiling,shuffled-families,shuffled"
_HERE = Path("target") / "beds"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 where runs failed."""
    given = _parser().parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False)
    kind = KINDS[given.bed]
    sizes = {field.name: getattr(given, field.name) for field in dataclasses.fields(kind.options)}
    comparison = Comparison(
        kind=given.bed,
        options=kind.options(**sizes),
        arms=parse_methods(given.arms, names(), "--arms"),
        rs=given.r or [kind.r],
        lrs=given.lr or kind.lrs,
        seeds=given.seeds,
        tune_seeds=given.tune_seeds,
        alpha=given.alpha,
        warmup=given.warmup,
        source_r=given.source_r,
    )
    out = given.out or _HERE / f"{given.bed}.jsonl"
    failed = 0 if given.report else _train(comparison, out, given, console)
    # Read, not locked: another process may be in the midst of it.
    records = {record["id"]: record for record in read_results(out)}
    plan = Plan(comparison, records.get)
    found = tables(plan)
    page = out.with_suffix(".md")
    text = "\n".join(table.markdown() for table in found)
    page.write_text(text, encoding="utf-8")
    console.print(text, markup=False)
    console.print(str(page), markup=False)
    picture = draw(plan, out.with_suffix(".png"))
    if picture is not None:
        console.print(str(picture), markup=False)
    return 1 if failed else 0


def _train(comparison: Comparison, out: Path, given: argparse.Namespace, console: Console) -> int:
    with Results(out) as results:
        runs = Runs(comparison, results, given.cache, given.jobs, console.print)
        runs.run()
    return runs.failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benches.beds",
        description=_about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    beds = parser.add_subparsers(dest="bed", required=True, metavar="BED")
    for name, kind in KINDS.items():
        bed = beds.add_parser(name, help=kind.figure.name)
        _shared(bed)
        for field in dataclasses.fields(kind.options):
            option = field.metadata.get("option", f"--{field.name.replace('_', '-')}")
            bed.add_argument(
                option,
                dest=field.name,
                type=_type_of(field.default),
                default=field.default,
                help=f"({field.default})",
            )
    return parser


def _shared(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--arms", default=_ARMS, help=f"of {', '.join(names())}, each perhaps with :name=value,... ({_ARMS})")
    add(
        "--r",
        type=_many(float),
        default=None,
        help="budgets: parameters of LoRA of that rank everywhere (2; text: 1)",
    )
    add(
        "--lr",
        type=_many(float),
        default=None,
        help="learning rates that every arm tries (the bed's own grid)",
    )
    add("--seeds", type=int, default=6, help="paired runs (6)")
    add("--tune-seeds", type=int, default=1, help="seeds on which the learning rate is chosen (1)")
    add("--alpha", type=float, default=16.0, help="lora_alpha (16)")
    add("--warmup", type=float, default=0.05, help="share of the steps (0.05)")
    add("--source-r", type=int, default=16, help="rank of the LoRA from which the ceiling is cut (16)")
    add("--out", type=Path, default=None, help=f"results, a line of JSON a run ({_HERE}/BED.jsonl)")
    add("--cache", type=Path, default=_HERE / "cache", help=f"what is costly to make ({_HERE}/cache)")
    add("--jobs", type=int, default=1, help="processes, each on one core (1)")
    add("--report", action="store_true", help="train nothing, print the table")


def _type_of(default: Any) -> Callable[[str], Any]:
    if isinstance(default, tuple):
        return lambda text: tuple(int(part) for part in text.split(","))
    return type(default)


def _many(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
