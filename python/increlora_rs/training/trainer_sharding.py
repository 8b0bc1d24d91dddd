"""Trainer's ``fsdp``: accelerate shards what it is not told to leave alone, so it is told of the adapter."""

from __future__ import annotations

import re
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn

from ..layers.found import all_adapted_layers
from .sharding import adapter_parameters


def leave_adapter_whole(model: nn.Module, device: torch.device) -> None:
    """Has accelerate's FSDP2 leave the adapters of ``model`` out, and moves them to ``device``, for then
    accelerate does not.

    Nothing is done where there is no adapter, or no FSDP2.

    Raises:
        ValueError: the plugin is to load the model in the first process alone.
    """
    # What the Trainer's Accelerator, or `accelerate launch`, has set.
    plugin: Any = AcceleratorState._shared_state.get("fsdp_plugin")
    layers = all_adapted_layers(model)
    if not layers or getattr(plugin, "fsdp_version", None) != 2:
        return
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "cpu_ram_efficient_loading=True in the FSDP configuration: accelerate then takes every parameter "
            "for a sharded one, and an adapter that grows is left whole. Set it to false; each process loads "
            "the base before it is sharded."
        )
    for layer in layers:
        for name, child in layer.named_children():
            if name != "base_layer":
                child.to(device)
    whole = nn.ParameterList(adapter_parameters(model)).to(device)
    plugin.ignored_modules = [*_given(plugin.ignored_modules, model), whole]


def _given(ignored: Any, model: nn.Module) -> list[nn.Module]:
    """What the user has left out already: modules, or a pattern of their names."""
    if isinstance(ignored, str):
        return [module for name, module in model.named_modules() if re.fullmatch(ignored, name)]
    return list(ignored or ())
