"""Several processes: the same choice in each, and DDP's buckets made anew after a growth."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

# What was found by a look at all objects, which takes longer than all else at a growth.
_found: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DistributedDataParallel]] = (
    weakref.WeakKeyDictionary()
)


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


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel around ``model``: a Trainer does not hand it to its callbacks."""
    # A group of one process has a reducer with sizes of its own, too.
    if not (dist.is_available() and dist.is_initialized()):
        return None
    known = _found[model]() if model in _found else None
    if known is not None:
        return known
    for candidate in gc.get_objects():
        # By type: asking some of torch's own objects for their class warns.
        if issubclass(type(candidate), DistributedDataParallel) and any(
            module is model for module in candidate.modules()
        ):
            _found[model] = weakref.ref(candidate)
            return candidate
    return None


def rebuild_buckets(ddp: DistributedDataParallel) -> None:
    """Makes DDP's reducer anew for parameters that changed their size in place."""
    # The reducer fixes sizes and buckets when it is built, and DDP has no public way to build another.
    internal: Any = ddp
    internal.reducer._remove_autograd_hooks()
    comm_hooks = list(internal._comm_hooks)
    parameters, expects_sparse = internal._build_params_for_reducer()
    names = internal._build_debug_param_to_name_mapping(parameters)
    internal._ddp_init_helper(parameters, expects_sparse, names, internal.static_graph)
    internal._has_rebuilt_buckets = False
    if internal.static_graph:
        # The new reducer learns the graph in its first backward pass, as the old one did.
        internal.reducer._set_static_graph()
        internal.logger._set_static_graph()
        internal._static_graph_delay_allreduce_enqueued = False
    internal._comm_hooks = []
    for hook, state in comm_hooks:
        internal.register_comm_hook(state, hook)


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
