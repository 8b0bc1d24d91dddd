"""How a plain LoRA stores A and B of each kind of module; here they are always matrices."""

from __future__ import annotations

import re

from torch import Tensor, nn

from ..layers.dora import MAGNITUDE
from ..support.sites import Kind

_LORA_FACTOR = re.compile(
    r"^(?P<name>.+)\.lora_((?P<factor>[AB])\.weight|embedding_(?P<embedding_factor>[AB]))$"
)


def lora_tensors(name: str, a: Tensor, b: Tensor, kind: Kind) -> dict[str, Tensor]:
    """A (rank, in) and B (out, rank) of module ``name``, in a LoRA's shapes and under its keys."""
    module = f"base_model.model.{name}"
    if kind == "embedding":
        return {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    if isinstance(kind, tuple):
        a = a.reshape(a.shape[0], -1, *kind)
        b = b.reshape(*b.shape, *(1 for _ in kind))
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with components of 0 up to ``rank``."""
    missing = rank - a.shape[0]
    return nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))


def dora_tensor(name: str, magnitude: Tensor, kind: Kind) -> dict[str, Tensor]:
    """DoRA's magnitudes (out) of module ``name``, in PEFT's shape and under its key."""
    shape = (1, -1, *(1 for _ in kind)) if isinstance(kind, tuple) else (-1,)
    return {f"base_model.model.{name}.{MAGNITUDE}": magnitude.reshape(shape)}


def dora_key(key: str) -> str | None:
    """The name of the module whose magnitudes ``key`` is of; None: it is of none."""
    name, dot, end = key.removesuffix(".weight").rpartition(".")
    return name if dot and end == MAGNITUDE else None


def lora_key(key: str) -> tuple[str, str, bool] | None:
    """Module name, "A" or "B", and whether of an embedding; None: ``key`` is no factor of a LoRA."""
    match = _LORA_FACTOR.match(key)
    if match is None:
        return None
    embedding = match["embedding_factor"] is not None
    return match["name"], match["embedding_factor"] or match["factor"], embedding


def matrices(a: Tensor, b: Tensor, embedding: bool) -> tuple[Tensor, Tensor, Kind]:
    """A LoRA's tensors of one module as matrices A (rank, in) and B (out, rank), and its kind."""
    if embedding:
        return a, b, "embedding"
    if a.dim() > 2 and b.dim() == a.dim():
        return a.flatten(1), b.flatten(1), tuple(a.shape[2:])
    return a, b, "linear"
