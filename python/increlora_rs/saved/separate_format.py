"""A LoRA of fused experts as one pair of matrices for each layer that an expert was before it was fused.

Servers that read it have conditions, which vLLM's ``PackedLoRALayerWeights.pack_moe`` states: all experts of
a projection have one rank, and all of a layer's experts have all of their projections.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..support.unfused import layers_by_parameter
from .lora_format import lora_tensors, padded
from .stacked_format import matrices_of


@dataclass(frozen=True)
class Separate:
    """The LoRAs of the layers of one projection: one an expert, or one of a router.

    Args:
        name: Full name of the layers, with "*" for the expert's number.
        pairs: A (rank, in) and B (out, rank) by the layer's full name.
        rank: Of each pair.
        source: The name of the module here whose dtype they have.
    """

    name: str
    pairs: dict[str, tuple[Tensor, Tensor]]
    rank: int
    source: str

    @property
    def pattern(self) -> str:
        """The key of ``rank_pattern`` for them."""
        return "^" + re.escape(self.name).replace(r"\*", r"\d+")

    def tensors(self) -> dict[str, Tensor]:
        """Under PEFT's keys. None shares its numbers with another, for a file holds nothing twice."""
        return {
            key: tensor.clone()
            for name, (a, b) in self.pairs.items()
            for key, tensor in lora_tensors(name, a, b, "linear").items()
        }


def separate(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    parameters: Mapping[str, int],
    layers: Mapping[str, list[str]],
    rank: int | None,
) -> list[Separate]:
    """The LoRAs of the layers that the parameters were, without modules whose experts all have rank 0.

    Args:
        factors: A (r, in) and B (out, r) by module; of rank 0 where it is missing.
        parameters: By full name the number of experts in each; 0 where it is one matrix.
        layers: What :func:`~increlora_rs.support.unfused.unfused_layers` gives.
        rank: That of all; None: each projection has the largest of its experts.

    Raises:
        ValueError: there are no adapted experts, or ``layers`` knows no names of theirs.
    """
    if not any(parameters.values()):
        raise ValueError(
            "experts='separate': the adapter is on no experts of target_parameters; leave it out."
        )
    found, done = [], set()
    for name, count in parameters.items():
        module, _, own = name.rpartition(".")
        known = layers_by_parameter(layers, module)
        if own not in known:
            raise ValueError(
                f"experts='separate': {name!r} has no separate experts in checkpoints of its model, so that "
                "there are no names for them; experts='fused' writes PEFT's layout, or merge the adapter by "
                "merge_and_unload()."
            )
        if count and module not in done:
            done.add(module)
            found += _experts(factors, module, count, known, rank)
        elif not count and name in factors:
            pair = factors[name]
            of_it = rank or len(pair[0])
            found.append(Separate(known[own][0], {known[own][0]: padded(*pair, of_it)}, of_it, name))
    return found


def _experts(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    module: str,
    count: int,
    layers: Mapping[str, list[str]],
    rank: int | None,
) -> list[Separate]:
    """Those of one module's parameters, the ones that are not adapted among them."""
    names = matrices_of({f"{module}.{parameter}": count for parameter in layers})
    acting = {name: [one for one in ones if one in factors] for name, ones in names.items()}
    source = next((ones[0] for ones in acting.values() if ones), None)
    if source is None:
        return []
    found = []
    for name, experts in names.items():
        of_all = rank or max((len(factors[one][0]) for one in acting[name]), default=1)
        nothing = _nothing(factors, acting, name, layers)
        pairs = [padded(*factors.get(one, nothing), of_all) for one in experts]
        projections = layers[name.rpartition(".")[2]]
        for part, layer in enumerate(projections):
            separated = {
                layer.replace("*", str(number)): (a, b.chunk(len(projections))[part])
                for number, (a, b) in enumerate(pairs)
            }
            found.append(Separate(layer, separated, of_all, next(iter(acting[name]), source)))
    return found


def _nothing(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    acting: Mapping[str, list[str]],
    name: str,
    layers: Mapping[str, list[str]],
) -> tuple[Tensor, Tensor]:
    """A and B of rank 0 for an expert of parameter ``name``."""
    if acting[name]:
        a, b = factors[acting[name][0]]
        return a[:0], b[:, :0]
    # What one projection of an expert reads, the other one writes.
    other = next(one for one, ones in acting.items() if ones)
    a, b = factors[acting[other][0]]
    width = b.shape[0] // len(layers[other.rpartition(".")[2]])
    parts = len(layers[name.rpartition(".")[2]])
    return a.new_zeros(0, width), b.new_zeros(a.shape[1] * parts, 0)
