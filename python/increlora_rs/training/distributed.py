"""Several processes: what all have to know alike, so that they choose alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor


def several_processes() -> bool:
    """Is this one of several processes of a training?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_(values: Tensor) -> None:
    """Replaces ``values`` by their mean over the processes, so that every process decides alike."""
    if several_processes():
        dist.all_reduce(values)
        values /= dist.get_world_size()


def from_first_(values: Tensor) -> None:
    """Replaces ``values`` by the first process's."""
    if several_processes():
        dist.broadcast(values, 0)


def in_any_process(facts: Tensor, device: torch.device) -> npt.NDArray[np.bool_]:
    """Which of ``facts`` (bool, on the host) hold in some process; ``device``: where processes talk."""
    if several_processes():
        shared = facts.to(device, torch.int32)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        facts = shared.cpu() > 0
    result: npt.NDArray[np.bool_] = facts.numpy()
    return result


def from_holder(value: Any, device: torch.device) -> Any:
    """``value``, or in a process where it is None that of the first process where it is not."""
    if not several_processes():
        return value
    count = dist.get_world_size()
    # The first that has it, and the first that has not.
    has = dist.get_rank() if value is not None else count
    has_not = dist.get_rank() if value is None else count
    firsts = torch.tensor([has, has_not], device=device)
    dist.all_reduce(firsts, dist.ReduceOp.MIN)
    holder, lacking = (int(first) for first in firsts.tolist())
    if count in (holder, lacking):
        return value
    held = [value]
    dist.broadcast_object_list(held, holder)
    return held[0] if value is None else value


def shared_seed(seed: int, device: torch.device) -> int:
    """The first process's seed, in every process."""
    if not several_processes():
        return seed
    value = torch.tensor(seed % 2**62, dtype=torch.int64, device=device)
    dist.broadcast(value, 0)
    return int(value)
