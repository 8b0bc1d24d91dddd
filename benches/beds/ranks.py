"""Ranks by module at a budget of trained parameters: everywhere alike, in some modules alone, cut, shuffled.

A component of a module takes in + out parameters; the budget r is what rank r everywhere takes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from increlora_rs.support.seeded import generator
from increlora_rs.support.sites import places

Sizes = Mapping[str, tuple[int, int]]
Ranks = dict[str, int]
# Permutations that are drawn to find one of nearly the same number of parameters.
_DRAWS = 1000
_MLP = ("intermediate.dense", "output.dense", "gate_proj", "up_proj", "down_proj")
_NOT_MLP = "attention.output.dense"
_QUERY_AND_VALUE = ("query", "value", "q_proj", "v_proj")


def cost(sizes: Sizes, name: str) -> int:
    """Parameters of one component."""
    return sum(sizes[name])


def parameters(sizes: Sizes, ranks: Mapping[str, int]) -> int:
    """Parameters of ranks by module."""
    return sum(cost(sizes, name) * rank for name, rank in ranks.items())


def budget(sizes: Sizes, r: float) -> int:
    """Parameters of rank ``r`` everywhere; ``r`` may be below 1."""
    return int(r * sum(cost(sizes, name) for name in sizes))


def mlp(sizes: Sizes) -> list[str]:
    """The MLP's modules."""
    return [name for name in sizes if name.endswith(_MLP) and not name.endswith(_NOT_MLP)]


def query_and_value(sizes: Sizes) -> list[str]:
    """The modules that PEFT adapts by default in most models."""
    return [name for name in sizes if name.endswith(_QUERY_AND_VALUE)]


def families(names: Iterable[str]) -> dict[str, str]:
    """The kind of each module, the same in all layers."""
    return {name: kind for name, (_, kind) in places(names).items()}


def fill(sizes: Sizes, names: list[str], total: int) -> Ranks:
    """Ranks of the named modules, as equal as can be, that take as much of ``total`` parameters as equal
    ranks and one component more in some modules can.

    Raises:
        ValueError: there are no such modules, or they cannot take a rank so high.
    """
    if not names:
        raise ValueError(f"none of the modules {', '.join(sorted(sizes))} is of the kind that was asked for.")
    rank = total // sum(cost(sizes, name) for name in names)
    ranks = dict.fromkeys(names, rank)
    # The modules that one more component each brings closest, by the sums that can be reached.
    reached: dict[int, tuple[str, ...]] = {0: ()}
    left = total - parameters(sizes, ranks)
    for name in names:
        for taken, chosen in list(reached.items()):
            more = taken + cost(sizes, name)
            if more <= left:
                reached.setdefault(more, (*chosen, name))
    for name in reached[max(reached)]:
        ranks[name] += 1
    for name, rank in ranks.items():
        if rank > min(sizes[name]):
            raise ValueError(f"rank {rank} of {name} is more than its size {min(sizes[name])}; lower --r.")
    return ranks


def cut(sizes: Sizes, spectra: Mapping[str, list[float]], total: int) -> Ranks:
    """Ranks of the components that are worth most for each parameter, over all modules.

    Args:
        spectra: What each component of a module is worth, descending, by module.
        total: Parameters at most.
    """
    offers = sorted(
        ((value / cost(sizes, name), name) for name, values in spectra.items() for value in values),
        reverse=True,
    )
    ranks = dict.fromkeys(sizes, 0)
    left = total
    for worth, name in offers:
        if worth > 0.0 and cost(sizes, name) <= left:
            ranks[name] += 1
            left -= cost(sizes, name)
    return ranks


def shuffled_within(ranks: Ranks, seed: int) -> Ranks:
    """The ranks permuted within each family of modules: as many parameters, for those are of one size."""
    kinds = families(ranks)
    lots = _lots(seed, "families")
    out = dict(ranks)
    for kind in dict.fromkeys(kinds.values()):
        names = [name for name in ranks if kinds[name] == kind]
        values = [ranks[name] for name in names]
        lots.shuffle(values)
        out |= dict(zip(names, values, strict=True))
    return out


def shuffled_over(sizes: Sizes, ranks: Ranks, seed: int) -> Ranks:
    """The ranks permuted over all modules; of many permutations one that takes nearly as many parameters and
    not more."""
    lots, names = _lots(seed, "all"), list(ranks)
    target, best = parameters(sizes, ranks), dict(ranks)
    lack = target + 1
    for _ in range(_DRAWS):
        drawn = dict(zip(names, lots.sample(list(ranks.values()), len(names)), strict=True))
        missing = target - parameters(sizes, drawn)
        if 0 <= missing < lack and all(rank <= min(sizes[name]) for name, rank in drawn.items()):
            lack, best = missing, drawn
        if lack <= target // 100:
            break
    return best


def _lots(seed: int, purpose: str) -> random.Random:
    return random.Random(generator(seed, "shuffled", purpose).initial_seed())
