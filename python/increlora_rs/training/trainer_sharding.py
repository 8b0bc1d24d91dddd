"""Trainer's ``fsdp`` and ``deepspeed``: accelerate's FSDP2 shards what it is not told to leave alone, so it
is told of the adapter; FSDP1 and ZeRO lay parameters out for good, so the adapter takes the capacity form
before they do."""

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
    """Makes the adapters of ``model`` ready for the FSDP, or DeepSpeed, that accelerate is going to use, if
    any.

    Raises:
        ValueError: the plugin is to load the model in the first process alone, or the configuration has
            ``growth="resize"`` under FSDP1 or ZeRO.
    """
    # What the Trainer's Accelerator, or `accelerate launch`, has set.
    state = AcceleratorState._shared_state
    plugin: Any = state.get("fsdp_plugin")
    version = getattr(plugin, "fsdp_version", None)
    if state.get("deepspeed_plugins") is not None and AcceleratorState().deepspeed_plugin.zero_stage > 0:
        _give_room(model, "ZeRO", '"stage": 0 in zero_optimization')
    elif version == 1 and _give_room(model, "FSDP1", 'FSDP2 ("version": 2 in fsdp_config)'):
        _refuse_shards_on_disk(plugin)
        plugin.use_orig_params = True
        _make_no_units(model)
        watch_resume()
    elif version == 2:
        _leave_adapter_whole(model, plugin, device)
        watch_resume()


def _give_room(model: nn.Module, engine: str, other: str) -> bool:
    """Puts the adapters into the capacity form for ``engine``, if there are any. Are there?"""
    layers = all_adapted_layers(model)
    configs = {name: layer.configs[name] for layer in layers for name in layer.adapters}
    for name, config in configs.items():
        if getattr(config, "growth", "capacity") == "resize":
            raise ValueError(
                f"growth='resize' in the configuration, but Trainer's {engine} lays parameters into flat "
                "ones, in which they cannot change their size: leave growth out, or set growth='capacity'; "
                f"or use {other}."
            )
        make_room(model, name)
    return bool(configs)


def _refuse_shards_on_disk(plugin: Any) -> None:
    if plugin.state_dict_type.name != "FULL_STATE_DICT":
        raise ValueError(
            f"state_dict_type={plugin.state_dict_type.name} in fsdp_config: PEFT cannot save an adapter that "
            'FSDP1 has in pieces by that; set FULL_STATE_DICT, or use FSDP2 ("version": 2).'
        )


def _make_no_units(model: nn.Module) -> None:
    """Has PEFT's policy for FSDP1, which Trainer sets, make no unit of a module whose weight is trained: it
    does of those that have no module in them.

    A unit is gathered where it is called, which a factor is not, and where all processes save it; PEFT saves
    a head in the main one alone.
    """
    for module in list(model.modules()):
        weight = getattr(module, "weight", None)
        if not any(module.children()) and getattr(weight, "requires_grad", False):
            module.add_module("no_unit", nn.Module())


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
