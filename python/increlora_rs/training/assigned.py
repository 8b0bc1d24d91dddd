"""Notices, before a step, what else than this library gave a parameter another size, or put another in its
place."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
from torch import nn

from .fit import held_by
from .modules import AdaptedModule


class Assigned:
    """The parameters of one scheduler's adapter as it last left them.

    It is asked in every step, so it reads what it kept at hand, and no module.

    Args:
        modules: The adapter's modules.
    """

    def __init__(self, modules: Sequence[AdaptedModule]) -> None:
        self._modules = modules
        self.note()

    def note(self) -> None:
        """Takes what is there now."""
        held = [module.layer.held_factors(module.adapter) for module in self._modules]
        self._factors = [factor for factors in held for factor in factors]
        self._places = [factor._parameters for factor in self._factors]
        self._parameters: list[nn.Parameter | None] = [place.get("weight") for place in self._places]
        self._were_replaced = False
        self.note_sizes()

    def note_sizes(self) -> None:
        """Takes the sizes that parameters came to have, which are the same objects."""
        self._sizes = self._sizes_now()
        pairs = zip(self._parameters, self._sizes, strict=True)
        self._empty = [parameter for parameter, size in pairs if parameter is not None and size == 0]

    @property
    def empty(self) -> list[nn.Parameter]:
        """Those of no element."""
        return self._empty

    def changed(self) -> bool:
        """Is a size another than at the last :meth:`note`, or was a parameter another object when
        :meth:`check_held` looked?"""
        return self._were_replaced or self._sizes_now() != self._sizes

    def _replaced(self) -> bool:
        return not all(map(is_, (place.get("weight") for place in self._places), self._parameters))

    def _sizes_now(self) -> list[int]:
        pairs = zip(self._factors, self._parameters, strict=True)
        # In the capacity form the size stays, and is nothing where ZeRO 3 has taken the numbers away.
        return [
            factor.room[factor.dim] if factor.room else 0 if parameter is None else parameter.numel()
            for factor, parameter in pairs
        ]

    def check_held(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises ValueError where a parameter was replaced, and ``optimizer`` does not hold the new one."""
        self._were_replaced = self._replaced()
        if not self._were_replaced:
            return
        held = held_by(optimizer)
        for module in self._modules:
            if any(id(parameter) not in held for parameter in module.trained):
                raise ValueError(
                    f"model: the parameters of {module.name!r} are no longer those that the optimizer "
                    "trains: load_state_dict(..., assign=True), to('meta') or an assignment put others in "
                    "their place. Make the optimizer anew, then call detach() and increlora_rs.attach(model, "
                    "optimizer, ...); or load without assign=True."
                )
