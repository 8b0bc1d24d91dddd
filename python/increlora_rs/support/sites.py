"""What a module is and where it stands in its model: its kind, its size, the number of its layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

OUTSIDE = "-"
_LAYER = re.compile(r"\.(\d+)\.")
_NO_NAME = re.compile(r"(\d+|weight)$")
# A convolution's kind is the size of its kernel.
Kind = Literal["linear", "embedding"] | tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """A module that is adapted.

    Args:
        name: Full module name.
        kind: What it is; GPT-2's ``Conv1D`` is linear, too.
        out: Size of what comes out: features, channels of a convolution, numbers of an embedding.
        features: Size of what goes in: features, channels times the size of the kernel, number of embeddings.
        padding: An embedding's padding_idx.
    """

    name: str
    kind: Kind
    out: int
    features: int
    padding: int | None = None

    @property
    def family(self) -> str:
        """ "linear", "embedding" or "convolution"."""
        return self.kind if isinstance(self.kind, str) else "convolution"

    @property
    def largest_rank(self) -> int:
        """min(in, out): no update has a higher rank."""
        return min(self.out, self.features)


def places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Layer number ("-" outside of layers) and kind of each module, by its full name.

    A kind is the name within the layer, as short as still tells it from the other kinds: ``query`` for
    ``attention.self.query``.
    """
    found = {name: _place(name) for name in names}
    if len(set(found.values())) < len(found):
        # Two stacks of layers, an encoder's and a decoder's: the stack's name tells them apart.
        found = {name: _place(name, with_stack=True) for name in found}
    short = _shortest([kind for _, kind in found.values()])
    return {name: (layer, short[kind]) for name, (layer, kind) in found.items()}


def within_layer(name: str) -> str:
    """A module's name within its layer: ``attention.self.query``; outside of layers its whole name."""
    return _place(name)[1]


def depths(names: Iterable[str]) -> dict[str, tuple[int, int] | None]:
    """Where in the depth of its model each module stands: the place of its layer, from 0, among those of its
    stack that are named, and how many these are; None outside of layers."""
    stacks: dict[str, set[int]] = {}
    found: dict[str, tuple[str, int] | None] = {}
    for name in names:
        match = _LAYER.search(f".{name}.")
        found[name] = None
        if match is not None:
            stack, number = f".{name}"[: match.start()], int(match.group(1))
            found[name] = stack, number
            stacks.setdefault(stack, set()).add(number)
    order = {stack: sorted(numbers) for stack, numbers in stacks.items()}
    return {
        name: None if place is None else (order[place[0]].index(place[1]), len(order[place[0]]))
        for name, place in found.items()
    }


def in_order(layers: Iterable[str]) -> list[str]:
    """Distinct layer numbers in ascending order, "-" last."""
    return sorted(set(layers), key=lambda layer: (layer == OUTSIDE, 0 if layer == OUTSIDE else int(layer)))


def _place(name: str, with_stack: bool = False) -> tuple[str, str]:
    """A module's layer number and its name within the layer, if wished with the name of the stack of
    layers."""
    found = _LAYER.search(f".{name}.")
    if found is None:
        return OUTSIDE, name
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
        # An expert's number, and "weight", a router's parameter, are no names by themselves.
        endings = [ending for ending in endings if not _NO_NAME.match(ending)] or endings
        others = [f".{other}" for other in distinct if other != kind]
        unique = (e for e in endings if not any(other.endswith(f".{e}") for other in others))
        short[kind] = next(unique, kind)
    return short


def module_kinds(kinds: Mapping[str, Kind]) -> dict[str, str | list[int]]:
    """``module_kinds`` of a configuration, of kinds by module name: those that are not linear, for JSON."""
    return {
        name: list(kind) if isinstance(kind, tuple) else kind
        for name, kind in kinds.items()
        if kind != "linear"
    }
