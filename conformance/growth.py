"""Adapters of unequal ranks: the second of the two states in which PEFT's tests run."""

from __future__ import annotations

import functools
from typing import Any

import torch
from increlora_rs import IncreLoraModel
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import rank_pattern, short
from torch import nn

_ADDED = 3


def grow_new_adapters() -> None:
    """From now on every new adapter has grown, by 0, 1 or 2 components a module, when its model is
    handed out."""
    inject = IncreLoraModel.inject_adapter

    @functools.wraps(inject)
    def inject_grown(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # One that is loaded, or given ranks by hand, has unequal ranks already, and must keep them.
        ranks_given = bool(self.peft_config[adapter_name].rank_pattern)
        inject(self, model, adapter_name, *args, **kwargs)
        if not ranks_given:
            _grow(model, adapter_name)
            ranks = {short(n): m.r[adapter_name] for n, m in adapted_layers(model, adapter_name).items()}
            self.peft_config[adapter_name].rank_pattern = rank_pattern(ranks)

    IncreLoraModel.inject_adapter = inject_grown  # type: ignore[method-assign]


def _grow(model: nn.Module, adapter_name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for index, layer in enumerate(adapted_layers(model, adapter_name).values()):
        # A second adapter of the same layer grows differently.
        components = (index + len(layer.r)) % _ADDED
        room = layer.largest_rank - layer.r[adapter_name]
        structure: Any = layer.structure
        structure.grow(layer, adapter_name, min(components, room), generator)
