"""Command line: ``increlora-rs demo | inspect DIR | export DIR OUT | plot DIR PNG``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .export import export_lora
from .plots import plot_growth, plot_ranks, plot_scores
from .report import module_table, rank_table

_PICTURES = {"ranks": plot_ranks, "growth": plot_growth, "scores": plot_scores}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 1 after printing what was wrong."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"increlora-rs: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="increlora-rs", description="LoRA adapters whose ranks grow during training."
    )
    commands = parser.add_subparsers(required=True, metavar="{demo,inspect,export,plot}")

    demo = commands.add_parser("demo", help="fine-tune MiniLM on BBC news, beside plain LoRA")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    demo.add_argument("--seed", type=int, default=0, help="seed of the training")
    demo.add_argument("--rank", type=int, default=4, help="average rank")
    demo.add_argument("--epochs", type=float, default=3.0)
    demo.add_argument("--documents", type=int, default=None, help="use this many documents only")
    demo.set_defaults(run=_demo)

    inspect = commands.add_parser("inspect", help="table of a saved adapter's modules")
    inspect.add_argument("directory", metavar="DIR", help="what save_pretrained wrote")
    inspect.add_argument("--layers", action="store_true", help="ranks only, layer by layer")
    inspect.set_defaults(run=_inspect)

    export = commands.add_parser("export", help="write a saved adapter as a plain LoRA")
    export.add_argument("directory", metavar="DIR", help="what save_pretrained wrote")
    export.add_argument("out", metavar="OUT", help="folder of the plain LoRA")
    export.add_argument("--layout", choices=("uniform", "compact"), default="uniform")
    export.add_argument("--rank", type=int, default=None, help="uniform rank; default: the largest")
    export.set_defaults(run=_export)

    plot = commands.add_parser("plot", help="picture of a saved adapter's ranks, growth or scores")
    plot.add_argument("directory", metavar="DIR", help="what save_pretrained wrote")
    plot.add_argument("picture", metavar="PNG", help="where to draw; the ending gives the format")
    plot.add_argument(
        "--what",
        choices=tuple(_PICTURES),
        default="ranks",
        help="ranks by layer and module; their growth over the steps; the scores at each growth",
    )
    plot.set_defaults(run=_plot)
    return parser


def _demo(options: argparse.Namespace) -> None:
    # Imported here: Trainer takes seconds that the other commands need not spend.
    from .demo import run

    with warnings.catch_warnings():
        # Transformers deprecating its own names.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        run(
            options.out,
            seed=options.seed,
            r=options.rank,
            epochs=options.epochs,
            documents=options.documents,
        )


def _inspect(options: argparse.Namespace) -> None:
    table = (rank_table if options.layers else module_table)(options.directory)
    console = Console()
    if console.is_terminal:
        console.print(table)
    else:
        # In a file or a pipe no width is given: nothing is folded.
        print(table, end="")


def _export(options: argparse.Namespace) -> None:
    config = export_lora(options.directory, options.out, options.layout, options.rank)
    print(f"{options.out}: a plain LoRA of rank {config.r}; vLLM needs --max-lora-rank {config.r} or more")


def _plot(options: argparse.Namespace) -> None:
    _PICTURES[options.what](options.directory, options.picture)
    print(options.picture)


if __name__ == "__main__":
    sys.exit(main())
