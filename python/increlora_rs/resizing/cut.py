"""Tensors that ``fully_shard`` (FSDP2) has cut over the processes: DTensors, of which each has some rows."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_Value = TypeVar("_Value")


def is_cut(tensor: object) -> bool:
    """Has this process a part of it, and others the rest?"""
    return isinstance(tensor, DTensor)


def here(value: _Value) -> _Value | Tensor:
    """What this process has of a tensor that is cut, in the same memory; anything else as it is."""
    return value.to_local().detach() if isinstance(value, DTensor) else value


def whole(tensor: Tensor) -> Tensor:
    """All of it, without a gradient; of one that is cut all processes have to ask."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def cut_as(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which all processes have whole, cut over them as ``like`` is. Nothing is communicated."""
    assert isinstance(like, DTensor)
    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(value.detach(), mesh, placements, src_data_rank=None)


def device_of(parameter: Tensor) -> torch.device:
    """Where it is computed with; of one that is cut that may be another device than where its rows are kept
    (``CPUOffloadPolicy``)."""
    if not isinstance(parameter, DTensor):
        return parameter.device
    kind = parameter.device_mesh.device_type
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, torch.get_device_module(kind).current_device())


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules of ``model`` that ``fully_shard`` was called on; none where it is FSDP1's."""
    # Whoever called it has loaded it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (
        [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    )


def reshard(model: nn.Module) -> None:
    """Has ``model`` hold what ``fully_shard`` has cut, and not what it was gathered to in a forward pass."""
    for module in sharded_modules(model):
        module.reshard()
