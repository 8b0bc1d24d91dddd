"""Which form the adapter of a training is in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .form import InPlace, InRoom
from .modules import AdaptedModule
from .pieces import Whole, pieces_of
from .sharding import flat_parameters


def form_of(
    model: nn.Module, modules: Sequence[AdaptedModule], optimizer: torch.optim.Optimizer
) -> InPlace | InRoom:
    """The form of the adapter of ``modules``.

    Raises:
        ValueError: it is in the capacity form, and the optimizer cannot train that.
    """
    if not any(module.layer.has_room(module.adapter) for module in modules):
        return InPlace(modules, optimizer)
    parameters = [parameter for module in modules for parameter in module.trained]
    flats = flat_parameters(model, parameters)
    if not flats:
        return InRoom(modules, optimizer, Whole())
    pieces = pieces_of(flats, parameters)
    pieces.know([factor for module in modules for factor in module.layer.held_factors(module.adapter)])
    return InRoom(modules, optimizer, pieces)
