"""Which form the adapter of a training is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .deepspeed import ZeroPieces
from .form import InPlace, InRoom
from .modules import AdaptedModule
from .pieces import Pieces, Whole, pieces_of
from .sharded_pieces import sharded_pieces
from .sharding import flat_parameters


def form_of(
    model: nn.Module,
    modules: Sequence[AdaptedModule],
    optimizer: torch.optim.Optimizer,
    zero: Any | None,
) -> InPlace | InRoom:
    """The form of the adapter of ``modules``; ``zero``: the optimizer of DeepSpeed's that has ``optimizer``
    train pieces, if there is one.

    Raises:
        ValueError: it is in the capacity form, and the optimizer cannot train that.
    """
    if not any(module.layer.has_room(module.adapter) for module in modules):
        return InPlace(modules, optimizer)
    parameters = [parameter for module in modules for parameter in module.trained]
    pieces: Pieces | None = None
    if zero is not None:
        pieces = ZeroPieces(zero, parameters)
    elif (pieces := sharded_pieces(model, parameters)) is None:
        flats = flat_parameters(model, parameters)
        pieces = pieces_of(flats, parameters) if flats else None
    if pieces is None:
        return InRoom(modules, optimizer, Whole())
    pieces.know([factor for module in modules for factor in module.layer.held_factors(module.adapter)])
    return InRoom(modules, optimizer, pieces)
