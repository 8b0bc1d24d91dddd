"""Several processes: what all have to know alike, so that they choose alike."""

from __future__ import annotations

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


def shared_seed(seed: int, device: torch.device) -> int:
    """The first process's seed, in every process."""
    if not several_processes():
        return seed
    value = torch.tensor(seed % 2**62, dtype=torch.int64, device=device)
    dist.broadcast(value, 0)
    return int(value)
