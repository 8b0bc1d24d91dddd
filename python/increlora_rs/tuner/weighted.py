"""Weighted sums of adapters: exact, of a smaller rank, or after one of PEFT's ways to thin them out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import merge_utils
from torch import Tensor

from ..contract.config import MethodConfig
from ..layers import AdaptedLayer
from ..support import arguments
from ..support.lowrank import Svd, svd_of_product
from ..support.names import rank_pattern

# Those that thin out the updates themselves; the rest of PEFT's add factor to factor.
_THINNED = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
_FACTORWISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
# What tells which modules an adapter is on.
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")

Components = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class WeightedSum:
    """How adapters are to be added up; arguments as for ``IncreLoraModel.add_weighted_adapter``."""

    adapters: Sequence[str]
    weights: Sequence[float]
    combination_type: str
    svd_rank: int | None
    density: float | None
    majority_sign_method: str

    def __post_init__(self) -> None:
        if not self.adapters or len(self.adapters) != len(self.weights):
            raise ValueError(
                f"weights={list(self.weights)!r} must hold a number for each of adapters="
                f"{list(self.adapters)!r}, one or more."
            )
        for weight in self.weights:
            arguments.number("weights", weight)
        if len(self.adapters) > 1 and self.combination_type in _FACTORWISE:
            raise ValueError(
                f"combination_type={self.combination_type!r} adds the factors of the adapters, component by "
                "component, but components that grew apart do not correspond; take 'cat', which is exact, "
                "'svd', or one that ends in '_svd'."
            )
        arguments.choice("combination_type", self.combination_type, ("cat", "svd", *_THINNED, *_FACTORWISE))
        arguments.integer("svd_rank", self.svd_rank, at_least=1, optional=True)
        if self.svd_rank is not None and self.combination_type == "cat":
            raise ValueError(
                f"svd_rank={self.svd_rank} goes with a combination_type that ends in 'svd' only; 'cat' keeps "
                "every component."
            )
        arguments.choice("majority_sign_method", self.majority_sign_method, ("total", "frequency"))
        thinned = self.combination_type in _THINNED and len(self.adapters) > 1
        if thinned and self.density is None:
            raise ValueError(
                f"density=None: combination_type={self.combination_type!r} needs the part of the values to "
                "keep, above 0 and at most 1."
            )
        if self.density is not None:
            arguments.number("density", self.density, above=0.0, below=math.nextafter(1.0, 2.0))

    def of(self, layer: AdaptedLayer) -> Components:
        """The sum of the adapters that ``layer`` has: A (rank, in), B (out, rank), E (rank, 1), for a
        scale of 1."""
        parts = [part for part in zip(self.adapters, self.weights, strict=True) if part[0] in layer.adapters]
        exact = [_scaled(layer, name, weight) for name, weight in parts]
        if len(self.adapters) == 1:
            return exact[0]
        if self.combination_type in _THINNED:
            svd = self._thinned(layer, parts)
        else:
            a, b, e = _concatenated(exact)
            if self.combination_type == "cat" and a.shape[0] <= layer.largest_rank:
                return a, b, e
            svd = svd_of_product(b.double() * e.double().view(-1), a)
        largest = max(layer.rank(name) for name, _ in parts)
        rank = svd.rank if self.combination_type == "cat" else min(svd.rank, self.svd_rank or largest)
        svd, dtype = svd.first(rank), exact[0][0].dtype
        return svd.v.to(dtype), svd.u.to(dtype), svd.s.view(-1, 1).to(dtype)

    def _thinned(self, layer: AdaptedLayer, parts: list[tuple[str, float]]) -> Svd:
        updates = [(b * e.view(-1)) @ a for a, b, e in (_scaled(layer, name, 1.0) for name, _ in parts)]
        weights = torch.tensor([weight for _, weight in parts], device=updates[0].device)
        method: Any = getattr(merge_utils, self.combination_type.removesuffix("_svd"))
        further = (self.majority_sign_method,) if "ties" in self.combination_type else ()
        update = method(updates, weights, self.density, *further)
        return Svd(*torch.linalg.svd(update.double(), full_matrices=False))


def _scaled(layer: AdaptedLayer, name: str, weight: float) -> Components:
    update: Any = layer.update(name)
    return update.a.detach(), update.b.detach(), update.e.detach() * (weight * update.scale)


def _concatenated(components: list[Components]) -> Components:
    a, b, e = zip(*components, strict=True)
    return torch.cat(a), torch.cat(b, dim=1), torch.cat(e)


def combined_config(configs: Mapping[str, MethodConfig], ranks: Mapping[str, int]) -> MethodConfig:
    """Configuration of the sum of the adapters with ``configs`` by name: scale 1, and the given ranks by
    module name.

    Raises:
        ValueError: one of them trains more than its adapter.
    """
    for name, config in configs.items():
        for option in ("modules_to_save", "bias", "trainable_token_indices", "use_dora"):
            value = getattr(config, option)
            if value not in (None, [], "none", False):
                raise ValueError(
                    f"adapters: {name!r} has {option}={value!r}, and only the adapters' updates can be added "
                    "up; train it without."
                )
    first = next(iter(configs.values()))
    changes = first.of_sum(ranks) | {
        "use_rslora": False,
        "rank_pattern": rank_pattern(dict(ranks)),
        "alpha_pattern": {},
        "inference_mode": False,
    }
    if any(_selection(config) != _selection(first) for config in configs.values()):
        changes |= dict.fromkeys(_SELECTION)
        changes["target_modules"] = "|".join(map(re.escape, ranks))
    return dataclasses.replace(first, **changes)


def _selection(config: MethodConfig) -> list[Any]:
    return [getattr(config, name) for name in _SELECTION]
