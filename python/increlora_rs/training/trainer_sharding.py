"""Trainer's ``fsdp``: accelerate's FSDP2 shards what it is not told to leave alone, so it is told of the
adapter; FSDP1 lays parameters into flat ones, so the adapter takes the capacity form before it does."""

from __future__ import annotations

import re
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn

from ..layers.found import all_adapted_layers
from ..layers.room import make_room
from .sharding import adapter_parameters
from .trainer_resume import watch_resume


def prepare(model: nn.Module, device: torch.device) -> None:
    """Makes the adapters of ``model`` ready for the FSDP that accelerate is going to use, if any.

    Raises:
        ValueError: the plugin is to load the model in the first process alone, or the configuration has
            ``growth="resize"`` under FSDP1.
    """
    # What the Trainer's Accelerator, or `accelerate launch`, has set.
    plugin: Any = AcceleratorState._shared_state.get("fsdp_plugin")
    version = getattr(plugin, "fsdp_version", None)
    if version == 1:
        _give_room(model, plugin)
    elif version == 2:
        _leave_adapter_whole(model, plugin, device)
        watch_resume()


def _give_room(model: nn.Module, plugin: Any) -> None:
    """Has FSDP1 flatten adapters of the capacity form, and keep a parameter for each of theirs."""
    layers = all_adapted_layers(model)
    configs = {name: layer.configs[name] for layer in layers for name in layer.adapters}
    for name, config in configs.items():
        if getattr(config, "growth", "capacity") == "resize":
            raise ValueError(
                "growth='resize' in the configuration, but Trainer's FSDP1 lays parameters into flat ones, "
                "in which they cannot change their size: leave growth out, or set growth='capacity'; or use "
                'FSDP2 ("version": 2 in fsdp_config).'
            )
        make_room(model, name)
    if configs:
        plugin.use_orig_params = True
    for layer in layers:
        for factor in (factor for name in layer.adapters for factor in layer.held_factors(name)):
            # PEFT's policy, which Trainer sets, makes a unit of its own of each module with a trained weight
            # and no module in it, and gathers that where it is called, which a factor is not.
            factor.add_module("no_unit", nn.Module())


def _leave_adapter_whole(model: nn.Module, plugin: Any, device: torch.device) -> None:
    """Has accelerate's FSDP2 leave the adapters of ``model`` out, and moves them to ``device``, for then
    accelerate does not.

    Nothing is done where there is no adapter.

    Raises:
        ValueError: the plugin is to load the model in the first process alone.
    """
    layers = all_adapted_layers(model)
    if not layers:
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
