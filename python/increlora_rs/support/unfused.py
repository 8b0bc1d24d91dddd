"""What experts and routers were called before Transformers 5 fused them, each a layer of its own: checkpoints
have these names still, and so have servers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .experts import checkpoint_conversions, types_of, types_of_base

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_PLAIN = re.compile(r"[\w.*]+")


def unfused_layers(model: nn.Module, parameters: Mapping[str, int]) -> dict[str, list[str]]:
    """The layers that each of ``parameters`` was, and those of the experts' other parameters, with "*" for
    the number of a layer or expert. Of several layers in one matrix the first has its first rows. A parameter
    of experts that were never separate is left out.

    Args:
        parameters: By full name the number of experts in each; 0 where it is one matrix.
    """
    return _layers(types_of(model), parameters)


def unfused_layers_of_base(
    name_or_path: str | None, parameters: Mapping[str, int]
) -> dict[str, list[str]] | None:
    """The same of a base model by its configuration, if that lies on this machine; else None."""
    types = types_of_base(name_or_path)
    return None if types is None else _layers(types, parameters)


def layers_by_parameter(table: Mapping[str, list[str]], module: str) -> dict[str, list[str]]:
    """Of a table of :func:`unfused_layers`, by the name in ``module`` of each parameter: the full names of
    its layers, with "*" for the expert's number alone."""
    starred, numbers = _starred(f"{module}."), _NUMBER.findall(f"{module}.")
    found = {}
    for key, layers in table.items():
        if key.rpartition(".")[0] == starred.removesuffix("."):
            found[key.rpartition(".")[2]] = [_filled(layer, numbers) for layer in layers]
    return found


def _starred(name: str) -> str:
    return _NUMBER.sub("*", name)


def _filled(layer: str, numbers: list[str]) -> str:
    for number in numbers:
        layer = layer.replace("*", number, 1)
    return layer


def _layers(types: Iterable[str], parameters: Mapping[str, int]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    every = [checkpoint_conversions(kind) for kind in sorted(types)]
    for name, count in parameters.items():
        module, _, own = _starred(name).rpartition(".")
        for entries in every if count else ():
            for parameter, layers in _experts(entries, module).items():
                found.setdefault(f"{module}.{parameter}", layers)
        if not count and own == "weight":
            layer = f"{module}.weight"
            for entries in every:
                layer = _renamed(entries, layer)
            found[f"{module}.weight"] = [layer.removesuffix(".weight")]
    return found


def _experts(entries: list[Any], module: str) -> dict[str, list[str]]:
    """By the name in ``module`` of each parameter of experts: the layers that it was."""
    found = {}
    for entry in entries:
        targets, sources = _plain(entry.target_patterns), _plain(entry.source_patterns)
        if not _stacks(entry) or len(targets) != 1 or not sources:
            continue
        path, _, parameter = targets[0].rpartition(".")
        # A pattern may begin with a dot, or at the start of a name's part.
        if f".{module}".endswith(f".{path.removeprefix('.')}"):
            before = module[: len(module) - len(path.removeprefix("."))]
            layers = [before + source.removeprefix(".") for source in sources]
            found[parameter] = [_renamed(entries, layer).removesuffix(".weight") for layer in layers]
    return found


def _stacks(entry: Any) -> bool:
    """Does it put experts one upon another, each as it is or below another of its rows?"""
    done = [(type(one).__name__, getattr(one, "dim", None)) for one in getattr(entry, "operations", ())]
    return done in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def _renamed(entries: list[Any], layer: str) -> str:
    """``layer`` before the renamings among ``entries``, which are undone from the last on."""
    for entry in reversed(entries):
        targets, sources = _plain(entry.target_patterns), _plain(entry.source_patterns)
        if not getattr(entry, "operations", ()) and len(targets) == len(sources) == 1:
            layer = layer.replace(targets[0], sources[0], 1)
    return layer


def _plain(patterns: Any) -> list[str]:
    """Those patterns as names; none where one is a regular expression."""
    each = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [pattern.replace("\\.", ".").removesuffix("$") for pattern in each]
    return names if all(_PLAIN.fullmatch(name) for name in names) else []
