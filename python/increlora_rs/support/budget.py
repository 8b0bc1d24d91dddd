"""What the ranks of an adapter may take in all: a total rank, or a number of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """The budget of an adapter, in the unit of ``budget_unit``.

    Args:
        total: The budget.
        costs: What a component of each module takes of it: 1 where the unit is "rank", else the numbers that
            it trains, in + out + 1 (its row of A, its column of B, its E).
        unit: "rank" or "parameters".
    """

    total: int
    costs: list[int]
    unit: str

    @classmethod
    def of(cls, r: float, unit: str, sizes: Iterable[tuple[int, int]]) -> Budget:
        """The budget for modules of the given sizes (out, in): what rank ``r`` everywhere takes, rounded, and
        never less than one component."""
        in_parameters = unit == "parameters"
        costs = [out + features + 1 if in_parameters else 1 for out, features in sizes]
        return cls(max(round(r * sum(costs)), min(costs, default=0)), costs, unit)

    def __str__(self) -> str:
        return amount(self.total, self.unit)

    def spent(self, ranks: Iterable[int]) -> int:
        """What the given ranks take of it."""
        return spent(self.costs, ranks)

    def told(self, ranks: Sequence[int], of: str = "of a budget of") -> str:
        """The given ranks and what they take of the budget, in words: "8 of a budget of 12"."""
        return told(sum(ranks), self.total, self.parameters(ranks), of)

    def parameters(self, ranks: Iterable[int]) -> int | None:
        """What the given ranks take of a budget in parameters; None where it is a total rank."""
        return None if self.unit == "rank" else self.spent(ranks)


def spent(costs: Iterable[int], ranks: Iterable[int]) -> int:
    """What ranks take where a component of each module costs so much."""
    return sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))


def told(total_rank: int, budget: int, parameters: int | None, of: str = "of a budget of") -> str:
    """A total rank and a budget in words; ``parameters`` are those of the components, None where the budget
    is a total rank."""
    if parameters is None:
        return f"{total_rank} {of} {budget}"
    return f"{total_rank}, {parameters} {of} {budget} parameters"


def amount(budget: int, unit: str) -> str:
    """A budget with its unit, unless that is the rank."""
    return str(budget) if unit == "rank" else f"{budget} {unit}"
