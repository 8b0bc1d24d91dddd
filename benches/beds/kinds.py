"""The beds that there are, by name: their figure, their options, how they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import memory, planted, text
from .bed import Bed, Figure


@dataclass(frozen=True)
class Kind:
    """A kind of bed.

    Args:
        figure: What it measures.
        options: The dataclass of its sizes, whose fields are options of the command line.
        lrs: Learning rates that are tried if none are given, each twice the one before.
        r: Budget if none is given.
        knows_ranks: Does it know where ranks belong?
        make: Makes the bed of options, a seed and a folder for what is costly to make.
    """

    figure: Figure
    options: type[Any]
    lrs: list[float]
    r: float
    knows_ranks: bool
    make: Callable[[Any, int, Path | None], Bed]


KINDS = {
    "planted": Kind(planted.FIGURE, planted.Options, [2.5e-3, 5e-3, 1e-2], 2.0, True, planted.Planted),
    "memory": Kind(memory.FIGURE, memory.Options, [2e-3, 4e-3, 8e-3], 2.0, False, memory.Memory),
    "text": Kind(text.FIGURE, text.Options, [2.5e-3, 5e-3, 1e-2], 1.0, False, text.Text),
}


@lru_cache(maxsize=1)
def bed_of(kind: str, options: Any, seed: int, cache: Path | None) -> Bed:
    """The bed, kept until another is asked for: all arms of a seed run on it."""
    return KINDS[kind].make(options, seed, cache)
