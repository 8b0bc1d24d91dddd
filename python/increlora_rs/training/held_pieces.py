"""An average of which each process has a piece, as it has of the adapter (FSDP): whole to follow ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..resizing.cut import here, is_cut
from .held import Held, HeldLayer, HeldTensor, checked
from .pieces import Whole


@contextmanager
def held_whole(found: list[Held], places: Whole) -> Iterator[list[Held]]:
    """``found`` of an average, tensors whole that are pieces as the adapter's parameters are; they get what
    was made of the whole. Where the adapter is in pieces, all processes call it alike.

    Raises:
        ValueError: its parts have other sizes than they are to have.
        NotImplementedError: it has a part of them in this process, other than the adapter's.
    """
    pieces = _pieces(found, places)
    weights = [held.holder.weight for held in pieces]
    wide = any(held.tensor.dtype is torch.float64 for held in pieces)
    wholes = places.gathered(weights, [here(held.tensor) for held in pieces], wide=wide) if pieces else []
    for held, whole in zip(pieces, wholes, strict=True):
        assert whole is not None
        held.piece, held.tensor = held.tensor, whole.to(held.tensor.dtype)
    yield checked(found)
    with torch.no_grad():
        for held in pieces:
            holder = held.holder
            places.put(holder, here(held.given), held.tensor, held.tensor.shape[holder.dim])


def _pieces(found: list[Held], places: Whole) -> list[HeldTensor]:
    """Those that are to be made whole: all tensors, or none."""
    if not places.is_sharded:
        return []
    tensors = [held for held in found if isinstance(held, HeldTensor)]
    # Rows of a whole one may be as many as a piece has, of some factor in some process.
    others = [held for held in tensors if not _is_piece(held, places)]
    if not places.in_any(bool(others) or not tensors):
        return tensors
    parts = [
        held
        for held in others
        if is_cut(held.tensor) or held.tensor.dim() != len(held.holder.outline().shape)
    ]
    copies = [held for held in found if isinstance(held, HeldLayer) and held.is_part()]
    if parts or copies:
        what = parts[0].what if parts else f"module {copies[0].copy.name!r}"
        raise NotImplementedError(
            f"average: the {what} is a part of what it is the average of, other than this process has of the "
            "adapter. Give copies of model.parameters() as they are in each process, by name or as a list "
            "(FSDP), or whole tensors that all processes hold, as those that are copied within "
            "deepspeed.zero.GatheredParameters(...) are; no copy of a sharded model is followed."
        )
    return []


def _is_piece(held: HeldTensor, places: Whole) -> bool:
    weight = held.holder.weight
    if is_cut(held.tensor) and held.tensor.shape != weight.shape:
        return False
    return here(held.tensor).shape == places.value(weight).shape
