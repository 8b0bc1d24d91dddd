"""How PEFT 0.21 stores a LoRA of a parameter (``lora.ParamWrapper``): of E experts in one, one rank r for
all.

A is (E r, in), expert by expert. B is (out, E r), and read as (out, r, E). Where several parameters of a
module are adapted, their wrappers lie in one another, the last one outermost; keys have a ``base_layer`` for
each that is further out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .lora_format import padded


@dataclass(frozen=True)
class Stacked:
    """A LoRA of one parameter.

    Args:
        name: The parameter's full name.
        key: What its tensors' keys begin with.
        a: (E rank, in).
        b: (out, E rank).
        rank: Of each matrix.
        source: The name of the module here whose dtype it has.
    """

    name: str
    key: str
    a: Tensor
    b: Tensor
    rank: int
    source: str

    def tensors(self) -> dict[str, Tensor]:
        """Under PEFT's keys."""
        return {f"{self.key}.lora_A.weight": self.a, f"{self.key}.lora_B.weight": self.b}


def matrices_of(parameters: Mapping[str, int]) -> dict[str, list[str]]:
    """By the full name of each parameter the modules that its matrices are here: ``NAME.3`` for the fourth of
    several, ``NAME`` for the one.

    Args:
        parameters: How many there are in each; 0 where it is one.
    """
    return {
        name: [f"{name}.{number}" for number in range(count)] if count else [name]
        for name, count in parameters.items()
    }


def stacked(
    factors: Mapping[str, tuple[Tensor, Tensor]], parameters: Mapping[str, int], rank: int | None
) -> list[Stacked]:
    """The LoRAs of the parameters, without those whose matrices all have rank 0.

    Args:
        factors: A (r, in) and B (out, r) by module; of rank 0 where it is missing.
        parameters: As for :func:`matrices_of`, in model order.
        rank: That of all; None: each parameter has the largest of its matrices.
    """
    acting = {
        name: matrices
        for name, matrices in matrices_of(parameters).items()
        if any(one in factors for one in matrices)
    }
    found = []
    for name, matrices in acting.items():
        of_all = rank or max(len(factors[one][0]) for one in matrices if one in factors)
        # All of a parameter are of one size.
        a, b = next(factors[one] for one in matrices if one in factors)
        pairs = [padded(*factors.get(one, (a[:0], b[:, :0])), of_all) for one in matrices]
        a = torch.cat([a for a, _ in pairs])
        b = torch.stack([b for _, b in pairs], dim=2).flatten(1)
        found.append(Stacked(name, _key(name, list(acting)), a, b, of_all, matrices[0]))
    return found


def _key(name: str, names: list[str]) -> str:
    """Of the parameters of one module the last has the outermost wrapper."""
    module = name.rpartition(".")[0]
    beside = [one for one in names if one.rpartition(".")[0] == module]
    inside = len(beside) - 1 - beside.index(name)
    return ".".join(["base_model.model", module, *["base_layer"] * inside])
