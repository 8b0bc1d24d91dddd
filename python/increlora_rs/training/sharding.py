"""A base that is sharded over processes (FSDP), and the adapter in it, which is whole to change its size."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..layers.found import all_adapted_layers
from ..resizing.cut import is_cut
from .deepspeed import is_trained_by_zero
from .modules import AdaptedModule

_WHOLE = (
    "Leave the adapter whole: fully_shard(module, ignored_params=increlora_rs.adapter_parameters(model)) in "
    "each call; in Trainer give IncreLoraCallback in `callbacks`, which does so; in accelerate set "
    "ignored_modules, as docs/distributed.md shows. Or use DDP: leave out `fsdp` in TrainingArguments. Or "
    'shard the adapter with its base: set growth="capacity" in its configuration, and max_r.'
)


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What of ``model`` has to stay whole where its base is sharded: ``fully_shard(...,
    ignored_params=increlora_rs.adapter_parameters(model))``.

    Args:
        model: A model that ``get_peft_model`` or ``PeftModel.from_pretrained`` returned, before
            ``fully_shard``.

    Returns:
        The parameters of all its adapters of increlora_rs, those that a method keeps without training them
        included, and every other parameter that is trained. A scheduler of :func:`increlora_rs.attach`
        averages the gradients of those that its optimizer holds.

    Raises:
        ValueError: the model has no adapter of increlora_rs.
    """
    layers = all_adapted_layers(model)
    if not layers:
        raise ValueError(
            f"model: a {type(model).__name__} without an adapter of increlora_rs; make it with "
            "get_peft_model(model, IncreLoraConfig(...)) before it is sharded."
        )
    base = {id(parameter) for layer in layers for parameter in layer.get_base_layer().parameters()}
    ours = {p for layer in layers for p in layer.parameters() if id(p) not in base}
    return ours | {parameter for parameter in model.parameters() if parameter.requires_grad}


def refuse_sharded(parameter: nn.Parameter, *, has_room: bool, by_zero: bool = False) -> None:
    """Raises ValueError for a parameter that is sharded over processes and so cannot grow in place.

    Args:
        has_room: Is it of the capacity form, which FSDP may cut and ZeRO flatten?
        by_zero: Is the optimizer one of ZeRO's, that is known?
    """
    if is_cut(parameter) and not has_room:
        raise ValueError(
            f"model: its adapter is sharded (FSDP), and a sharded parameter cannot grow. {_WHOLE}"
        )
    # FSDP1's mark on parameters that it laid into a flat one.
    if getattr(parameter, "_fsdp_flattened", False) and not has_room:
        raise ValueError(
            "model: its adapter lies in a flat parameter of FullyShardedDataParallel (FSDP1), in which it "
            'cannot grow. Set growth="capacity" in its configuration, and use_orig_params=True; or use '
            "fully_shard (FSDP2), with the adapter left whole by "
            "ignored_params=increlora_rs.adapter_parameters(model); or DDP."
        )
    if is_trained_by_zero(parameter) and not (has_room and by_zero):
        raise ValueError(
            "model: DeepSpeed's ZeRO has laid its parameters out, in which form they cannot grow. Set "
            'growth="capacity" in the configuration, and give attach the engine, or its optimizer; or take '
            "stage 0; or use DDP: leave out `deepspeed` in TrainingArguments."
        )


def flat_parameters(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Any]:
    """The flat parameters of FSDP1 in which ``parameters`` are cut into pieces; none where they are whole.

    Raises:
        ValueError: some are and others not; or the pieces are not spread over all processes once.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    wanted, flats = {id(parameter) for parameter in parameters}, []
    for module in model.modules():
        # torch has no public name for what a module of FSDP1 holds.
        handle: Any = module._handle if isinstance(module, fsdp.FullyShardedDataParallel) else None
        if handle is None or not handle.uses_sharded_strategy:
            continue
        held = {id(one) for one in handle.flat_param._params or ()} & wanted
        if not held:
            continue
        if dist.get_world_size(handle.process_group) != dist.get_world_size():
            raise ValueError(
                "model: FullyShardedDataParallel (FSDP1) shards its adapter over some of the processes "
                "(HYBRID_SHARD), and ranks are chosen by all of them. Use ShardingStrategy.FULL_SHARD or "
                "SHARD_GRAD_OP."
            )
        wanted -= held
        flats.append(handle.flat_param)
    if flats and wanted:
        raise ValueError(
            "model: FullyShardedDataParallel (FSDP1) shards some parameters of the adapter and leaves "
            f"{len(wanted)} of {len(parameters)} whole; give it all of them."
        )
    return flats


def refuse_partly_sharded(modules: list[Any]) -> None:
    """Raises ValueError where ``fully_shard`` is over some of the processes: others then see the same data,
    and their gradients are parts of one."""
    for module in modules:
        for group in groups_of(module):
            size = group.mesh_info.mesh.size()
            if size != dist.get_world_size():
                raise ValueError(
                    f"model: fully_shard is over a mesh of {size} processes, and the process group has "
                    f"{dist.get_world_size()}; ranks are chosen by all of them. Shard over all, in one or "
                    "two dimensions; tensor and pipeline parallelism beside it are not supported."
                )


def refuse_split(modules: Sequence[AdaptedModule], sharded: list[Any]) -> None:
    """Raises ValueError where a base weight is split over processes by somebody else than FSDP, as tensor
    parallelism does: a process then computes a part of the module's output.

    Args:
        modules: The adapted modules.
        sharded: What ``fully_shard`` was called on.
    """
    groups = [group for module in sharded for group in groups_of(module)]
    of_fsdp = {id(parameter.sharded_param) for group in groups for parameter in group.fsdp_params}
    for module in modules:
        for parameter in module.layer.get_base_layer().parameters():
            if isinstance(parameter, DTensor) and id(parameter) not in of_fsdp:
                raise ValueError(
                    f"model: the base weight of {module.name!r} is split over a mesh of "
                    f"{parameter.device_mesh.size()} processes ({', '.join(map(str, parameter.placements))}) "
                    "by tensor parallelism, and so would its adapter have to be, which cannot grow. Leave "
                    "this module out of target_modules, or use DDP, or fully_shard as docs/distributed.md "
                    "has it."
                )


def refuse_other_modules(modules: Sequence[AdaptedModule], device: torch.device) -> None:
    """Raises ValueError, in all processes alike, where these adapt other modules, as stages of a pipeline do:
    ranks are chosen by all processes for all modules."""
    told = repr([(module.name, module.layer.out_features, module.layer.in_features) for module in modules])
    mark = torch.tensor(zlib.crc32(told.encode()), dtype=torch.int64, device=device)
    marks = torch.stack([mark, -mark])
    dist.all_reduce(marks, dist.ReduceOp.MAX)
    if int(marks.sum()) == 0:
        return
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, (len(modules), modules[0].name))
    first = next(rank for rank, other in enumerate(held) if other != held[0] or rank == len(held) - 1)
    raise ValueError(
        f"model: the processes adapt other modules: process 0 has {held[0][0]}, {held[0][1]!r} the first, "
        f"and process {first} has {held[first][0]}, {held[first][1]!r} the first. Ranks are chosen for all "
        "modules by all processes: stages of a pipeline (pipeline parallelism) are not supported; use "
        "fully_shard as docs/distributed.md has it, or give all processes one model and one target_modules."
    )


def reduces_gradients(modules: list[Any]) -> bool:
    """Is the backward pass at hand one that FSDP averages gradients in, and not one that
    ``set_requires_gradient_sync(False)`` leaves to a later one?"""
    return all(group.reduce_grads for module in modules for group in groups_of(module))


def groups_of(module: Any) -> list[Any]:
    """What ``fully_shard`` has made of a module's parameters."""
    # torch has no public name for them.
    groups: list[Any] = module._get_fsdp_state()._fsdp_param_groups
    return groups
