"""Command line: ``increlora-rs demo | inspect DIR | export DIR OUT | convert LORA OUT | plot |
compare``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from .compare.command import add_arguments as add_compare_arguments
from .methods.increlora.convert import convert_lora
from .reports.plots import plot_growth, plot_ranks, plot_scores
from .reports.tables import module_table, rank_table
from .saved.export import export_lora
from .saved.gguf_export import export_gguf

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
    commands = parser.add_subparsers(required=True, metavar="{demo,inspect,export,convert,plot,compare}")

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

    export = commands.add_parser("export", help="write a saved adapter as a plain LoRA, or for llama.cpp")
    export.add_argument("directory", metavar="DIR", help="what save_pretrained wrote")
    export.add_argument("out", metavar="OUT", help="folder of the plain LoRA; with --gguf, the file")
    export.add_argument("--gguf", action="store_true", help="write a GGUF file, which llama.cpp loads")
    export.add_argument("--base", default=None, help="with --gguf: the base model's directory or name")
    export.add_argument("--layout", choices=("uniform", "compact"), default=None, help="default: uniform")
    export.add_argument("--rank", type=int, default=None, help="default: the largest; below it, truncates")
    export.add_argument(
        "--experts",
        choices=("fused", "separate"),
        default=None,
        help="one pair for several experts, as PEFT has it (default), or one each, as vLLM reads them",
    )
    export.add_argument("--vllm-rank", action="store_true", help="round the rank up to one that vLLM takes")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: the adapter's; with --gguf float32",
    )
    export.set_defaults(run=_export)

    convert = commands.add_parser("convert", help="write a trained plain LoRA as an adapter that can grow")
    convert.add_argument("directory", metavar="LORA", help="folder of the plain LoRA")
    convert.add_argument("out", metavar="OUT", help="folder of the adapter")
    convert.add_argument("--r", type=int, default=None, help="average rank, its budget; default: what it has")
    convert.set_defaults(run=_convert)

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

    compare = commands.add_parser("compare", help="methods side by side on tasks, at the same budget")
    add_compare_arguments(compare)
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
    if options.gguf:
        _export_gguf(options)
        return
    if options.base is not None:
        raise ValueError("--base is for --gguf alone; a plain LoRA is written without the base model.")
    export = export_lora(
        options.directory,
        options.out,
        options.layout or "uniform",
        options.rank,
        vllm_rank=options.vllm_rank,
        experts=options.experts or "fused",
        dtype=options.dtype and getattr(torch, options.dtype),
    )
    rank, needed = export.config.r, export.max_lora_rank
    vllm = (
        f"vLLM needs --max-lora-rank {needed} or more" if needed else f"no rank of vLLM's is {rank} or more"
    )
    print(f"{options.out}: a plain LoRA of rank {rank}; {vllm}")
    for name, error in export.errors.items():
        if error:
            print(f"{name}: lost {error:.2%} of its update")
    if export.error:
        print(f"all updates together: lost {export.error:.2%}")


def _export_gguf(options: argparse.Namespace) -> None:
    for name in ("layout", "rank", "experts", "vllm_rank"):
        if getattr(options, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is for a plain LoRA; with --gguf each module keeps its rank."
            )
    dtype = getattr(torch, options.dtype or "float32")
    export = export_gguf(options.directory, options.base, options.out, dtype=dtype)
    ranks = export.ranks.values()
    print(
        f"{options.out}: an adapter for llama.cpp's {export.architecture!r} models, {len(ranks)} matrices, "
        f"ranks {min(ranks)} to {max(ranks)}; llama-server --model BASE.gguf --lora {options.out}"
    )


def _convert(options: argparse.Namespace) -> None:
    config = convert_lora(options.directory, options.out, options.r)
    ranks = config.rank_pattern.values()
    print(
        f"{options.out}: an IncreLoRA adapter of {len(ranks)} modules, ranks {min(ranks)} to {max(ranks)}, "
        f"{sum(ranks)} in all; budget: rank {config.r} on average"
    )


def _plot(options: argparse.Namespace) -> None:
    _PICTURES[options.what](options.directory, options.picture)
    print(options.picture)


if __name__ == "__main__":
    sys.exit(main())
