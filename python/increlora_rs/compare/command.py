"""The command ``increlora-rs compare``: its arguments, training, report."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

# Columns that a table needs.
_WIDTH = 160
_METHODS = "lora,rslora,adalora,increlora,paper,increlora-random,increlora-given"
_DESCRIPTION = """Trains methods at the same budget, of ranks or of parameters, on the same tasks and
compares them. Every method tries the same learning rates on the trial seeds; at the best of them, by the
development set after the last epoch, all seeds are trained. Runs that --out holds are not trained again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.description = _DESCRIPTION
    parser.add_argument(
        "--out", type=Path, required=True, help="JSONL file of the results; the report lies beside"
    )
    parser.add_argument("--report", action="store_true", help="train nothing, only report what --out holds")
    parser.add_argument(
        "--model", type=Path, help="directory of a Transformers model, or a GGUF file (which needs gguf)"
    )
    parser.add_argument(
        "--task",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="folders with train and dev (and test), or files: TSV, CSV or JSONL, perhaps with .gz",
    )
    parser.add_argument(
        "--methods",
        help="comma-separated; options after a colon: increlora:orth_reg_weight=0.1,restart_warmup=false "
        "all: lora and every method of increlora_rs "
        f"({_METHODS}; with --report: all that --out holds)",
    )
    parser.add_argument(
        "--equal",
        choices=("ranks", "parameters"),
        help="what all have equally much of: the average rank, or trained parameters, as near to those of "
        "LoRA of that rank as whole ranks come (ranks; parameters where --methods has all)",
    )
    parser.add_argument(
        "--r",
        type=_many(_rank),
        default=[2],
        metavar="R,...",
        help="average ranks (2); 0.5 and the like for methods that allocate",
    )
    parser.add_argument(
        "--lr", type=_many(float), default=[5e-4, 1e-3, 2e-3], metavar="LR,...", help="tried by all"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs at a method's best learning rate (3)")
    parser.add_argument("--trial-seeds", type=int, default=1, help="of them at every learning rate (1)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--max-length", type=int, default=128, help="tokens of an example that are read (128)"
    )
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="bfloat16: under autocast"
    )
    parser.add_argument(
        "--base-dropout", type=float, default=None, metavar="P", help="of the model's layers (its own)"
    )
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps (0.1)")
    parser.add_argument(
        "--alpha", type=float, default=16.0, help="lora_alpha of all methods that have one by default (16)"
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout of all methods (0)")
    parser.add_argument(
        "--targets", default="all-linear", help="names of modules, comma-separated (all-linear)"
    )
    parser.add_argument("--limit", type=int, default=None, help="rows of each set at most, for a try")
    parser.add_argument("--retry-failed", action="store_true", help="train again what failed")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Trains what is missing, then reports.

    Raises:
        ValueError, TypeError, OSError: an argument or a file is wrong.
        RuntimeError: runs failed; the others are done and reported.
    """
    # Imported here: Trainer takes seconds that the other commands need not spend.
    from .overview import overviews
    from .results import read_results
    from .summary import summarise

    failed = 0 if options.report else _train(options)
    records = read_results(options.out)
    if options.report and options.methods is not None:
        records = _only(options.methods, records, options.out)
    comparisons = summarise(records)
    across_tasks = overviews(comparisons)
    # A table that is cut says less than one whose lines the terminal breaks.
    console = Console(width=max(_WIDTH, Console().width))
    for table in [*across_tasks, *comparisons]:
        console.print(table)
    for path in write_report(across_tasks, comparisons, options.out):
        console.print(str(path), soft_wrap=True, highlight=False)
    if failed:
        raise RuntimeError(f"{failed} runs failed; {options.out} says why. --retry-failed trains them again.")


def _only(methods: str, records: list[Any], out: Path) -> list[Any]:
    from .methods import parse_methods

    wanted = [str(method) for method in parse_methods(methods)]
    for method in wanted:
        if not any(record["config"]["method"] == method for record in records):
            held = ", ".join(sorted({record["config"]["method"] for record in records}))
            raise ValueError(f"--methods: {out} holds no run of {method!r}; it holds {held}.")
    return [record for name in wanted for record in records if record["config"]["method"] == name]


def write_report(overviews: list[Any], comparisons: list[Any], out: Path) -> list[Path]:
    """Writes tables (Markdown) and charts beside ``out``; returns their files."""
    from .charts import draw_charts, draw_overview

    page, sections, files = out.with_suffix(".md"), [], []
    for k, overview in enumerate(overviews, start=1):
        number = f"-{k}" if len(overviews) > 1 else ""
        files.append(out.parent / f"{out.stem}-overview{number}.png")
        draw_overview(overview).savefig(files[-1], bbox_inches="tight")
        sections.append(_section(overview, files[-1:]))
    for comparison in comparisons:
        charts = draw_charts(comparison, out.parent, out.stem)
        files += charts
        sections.append(_section(comparison, charts))
    page.write_text("\n".join(sections), encoding="utf-8")
    return [page, *files]


def _section(table: Any, charts: list[Path]) -> str:
    return table.markdown() + "\n" + "".join(f"![{chart.stem}]({chart.name})\n" for chart in charts)


def _train(options: argparse.Namespace) -> int:
    import transformers

    from .methods import has_all, parse_methods
    from .session import Plan, compare
    from .tasks import read_task

    for name in ("model", "task"):
        if not getattr(options, name):
            raise ValueError(f"--{name} is missing; only --report does without.")
    for name in ("epochs", "batch", "max_length", "seeds", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be 1 or more.")
    if not 0.0 <= options.warmup < 1.0:
        raise ValueError(f"--warmup {options.warmup} must be a share of the steps, from 0 to below 1.")
    if options.base_dropout is not None and not 0.0 <= options.base_dropout < 1.0:
        raise ValueError(f"--base-dropout {options.base_dropout} must be from 0 to below 1.")
    targets = options.targets
    shared = {
        "epochs": options.epochs,
        "batch": options.batch,
        "max_length": options.max_length,
        "precision": options.precision,
        "base_dropout": options.base_dropout,
        "warmup": options.warmup,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": targets if targets == "all-linear" else targets.split(","),
        "limit": options.limit,
    }
    tasks = [read_task(path).limited(options.limit) for path in options.task]
    methods = parse_methods(options.methods or _METHODS)
    equal = options.equal
    if equal is None:
        equal = "parameters" if has_all(options.methods or "") else "ranks"
    plan = Plan(tasks, methods, options.r, options.lr, options.seeds, options.trial_seeds, shared, equal)
    # The new classifier's missing weights, and Transformers' own deprecations, are no news here.
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return compare(plan, options.model, options.out, retry_failed=options.retry_failed)


def _rank(text: str) -> float:
    """A whole rank as an integer: so runs of before have the same id."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _many(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if len(set(values)) < len(values) or min(values) <= 0:
            raise argparse.ArgumentTypeError(f"{text!r}: give different numbers above 0")
        return values

    parse.__name__ = f"list of {kind.__name__}"
    return parse
