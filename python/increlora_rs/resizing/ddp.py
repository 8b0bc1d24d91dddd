"""DDP's buckets, made anew for parameters that changed their size in place."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# What was found by a look at all objects, which takes longer than all else at a growth.
_found: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[DistributedDataParallel]]] = (
    weakref.WeakKeyDictionary()
)


def find_ddps(model: nn.Module) -> list[DistributedDataParallel]:
    """Each DistributedDataParallel that averages gradients of ``model``.

    It is around it, as a Trainer's, which it does not hand to its callbacks; around a part of it; or that of
    ``torch.distributed._composable.replicate``.
    """
    # A group of one process has a reducer with sizes of its own, too.
    if not (dist.is_available() and dist.is_initialized()):
        return []
    parameters = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    known = [ddp for each in _found.get(model, ()) if (ddp := each()) is not None]
    if known and parameters <= set().union(*map(held_by, known)):
        return known
    # By type: asking some of torch's own objects for their class warns.
    candidates = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    found = [ddp for ddp in candidates if parameters & held_by(ddp)]
    _found[model] = [weakref.ref(ddp) for ddp in found]
    return found


def held_by(ddp: DistributedDataParallel) -> set[int]:
    """Identities of the parameters that it averages, without those that it was told to leave alone."""
    internal: Any = ddp
    return {id(parameter) for parameter in internal._module_parameters}


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
