"""Several processes: the same choice in each, and DDP's buckets made anew after a growth."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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


def refuse_sharded(parameter: nn.Parameter) -> None:
    """Raises ValueError for a parameter that is sharded over processes and so cannot grow in place."""
    if isinstance(parameter, DTensor):
        raise ValueError(
            "model: its adapter is sharded (FSDP), and a sharded parameter cannot grow. Use DDP: leave out "
            "`fsdp` in TrainingArguments, or call fully_shard on the base model's frozen weights only."
        )
    if hasattr(parameter, "ds_id"):
        raise ValueError(
            "model: its parameters are partitioned by DeepSpeed ZeRO-3, and a partitioned parameter cannot "
            "grow. Use DDP: leave out `deepspeed` in TrainingArguments."
        )
