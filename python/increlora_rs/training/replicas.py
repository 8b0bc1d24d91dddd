"""An adapter that is whole in several processes is to be the same in each, so its gradients are averaged.

DistributedDataParallel does, or the user's script; where the base is sharded and the adapter left out, this
training does. Where nobody does the first step raises, in all processes alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..resizing.cut import device_of, is_cut, sharded_modules
from ..resizing.ddp import find_ddps, held_by
from .alike import differing
from .distributed import several_processes
from .modules import AdaptedModule
from .own_average import GradientAverage
from .sharding import (
    reduces_gradients,
    refuse_other_modules,
    refuse_partly_sharded,
    refuse_split,
)


class Replicas:
    """The copies of one adapter in the processes of a training.

    Args:
        model: The model, out of its wrappers.
        modules: Its adapted modules.
        optimizer: The torch optimizer.
        in_pieces: Is the adapter itself sharded, by an engine that averages its gradients? What else is
            trained may be whole, where FSDP2 was told to leave it out.

    Raises:
        ValueError: the model is sharded over some of the processes, or split by tensor parallelism; or the
            processes adapt other modules.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[AdaptedModule],
        optimizer: torch.optim.Optimizer,
        in_pieces: bool = False,
    ) -> None:
        self._model, self._modules = model, modules
        # Pieces are of one adapter, and there are no copies that could differ.
        self._several = several_processes() and not in_pieces
        self._steps = 0
        if several_processes():
            refuse_other_modules(modules, device_of(modules[0].trained[0]))
        self._sharded = sharded_modules(model)
        refuse_partly_sharded(self._sharded)
        refuse_split(modules, self._sharded)
        # Who shards, or wraps, may come after us: whether it is needed is known in the first backward pass.
        whole = several_processes() and bool(self._sharded) and _trains_whole(optimizer)
        self._own = GradientAverage(optimizer, self._averages) if self._several or whole else None
        if self._own is not None and self._sharded:
            self._own.share_values()
        # Known from the first step on; to look for them takes long.
        self._ddps: list[weakref.ref[Any]] | None = None

    def wrappers(self) -> list[Any]:
        """Each DistributedDataParallel of the model."""
        known = None if self._ddps is None else [ddp() for ddp in self._ddps]
        if known is not None and None not in known:
            return known
        found = find_ddps(self._model)
        if self._steps:
            self._ddps = [weakref.ref(ddp) for ddp in found]
        return found

    def begin(self) -> None:
        """Other parameters were loaded: looks at them in the next steps as in the first ones."""
        self._steps, self._ddps = 0, None

    def average(self) -> None:
        """Gradients are final: averages them, if that is this training's."""
        self._decide()
        if self._own is not None:
            self._own.finish()

    def check(self, *, deciding: bool) -> None:
        """Looks whether parameters and averaged gradients are alike.

        Args:
            deciding: Are ranks going to be decided by them, so that processes would part where they differ?

        Raises:
            ValueError: parameters or gradients differ between the processes.
        """
        if self._several:
            self._steps += 1
            if self._looks(deciding):
                self._check()

    def close(self) -> None:
        """The training is over."""
        if self._own is not None:
            self._own.remove()

    def _averages(self) -> bool:
        self._decide()
        return self._own is not None and reduces_gradients(self._sharded)

    def _decide(self) -> None:
        if self._own is None or self._sharded:
            return
        self._sharded = sharded_modules(self._model)
        refuse_partly_sharded(self._sharded)
        if not self._sharded:
            self._own.remove()
            self._own = None

    def _looks(self, deciding: bool) -> bool:
        """In the first two steps, and before ranks are decided; and at every power of two where no
        DistributedDataParallel promises that what was averaged once is averaged for ever."""
        if self._steps > 2 and not deciding and self._steps & (self._steps - 1):
            return False
        ddps = self.wrappers()
        if any(ddp._join_config.enable for ddp in ddps):
            # A process that has no more data takes part in DDP's communication alone.
            return False
        held = set().union(*map(held_by, ddps))
        ours = {id(parameter) for module in self._modules for parameter in module.trained}
        return self._steps <= 2 or deciding or not ours <= held

    def _check(self) -> None:
        # A parameter that modules share is looked at once.
        owners = {id(p): (p, module.name) for module in self._modules for p in module.trained}
        parameters = [parameter for parameter, _ in owners.values()]
        names = [name for _, name in owners.values()]
        gradients = [None if p.grad is None else p.grad.to_dense() for p in parameters]
        found = differing([*parameters, *gradients])
        if found:
            self._refuse_broken(names, parameters, gradients)
        values = [names[k] for k in found if k < len(names)]
        if values:
            raise ValueError(
                f"model: the adapter's parameters of {_some(values)} differ between the "
                f"{dist.get_world_size()} processes, and an adapter is to be the same in all. Call "
                "torch.manual_seed with one seed in all of them before get_peft_model, load the same "
                f"adapter, or wrap the model in DistributedDataParallel. {_ALONE}"
            )
        averaged = [names[k - len(names)] for k in found]
        if averaged:
            raise ValueError(
                f"model: the gradients of the adapter's parameters of {_some(averaged)} differ between the "
                f"{dist.get_world_size()} processes, so nobody has averaged them, and each would train "
                "an adapter of its own. Wrap the model in DistributedDataParallel, call the wrapper and not "
                "the model inside of it, and leave no_sync() for the last micro-batch of a step; or average "
                f"p.grad over the processes before optimizer.step(). {_ALONE}"
            )

    def _refuse_broken(
        self, names: list[str], parameters: list[nn.Parameter], gradients: list[Tensor | None]
    ) -> None:
        """Raises ValueError where numbers are not finite in some of the processes alone."""
        tensors = [*parameters, *gradients]
        held: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(held, {k for k, tensor in enumerate(tensors) if not _is_finite(tensor)})
        alone = set().union(*held) - set.intersection(*held)
        if alone:
            ranks = [str(rank) for rank, each in enumerate(held) if each & alone]
            where = _some([names[k % len(names)] for k in sorted(alone)])
            raise ValueError(
                f"model: the adapter's parameters or gradients of {where} hold values that are NaN or "
                f"infinite in process {', '.join(ranks)} of {len(held)} alone, which would decide ranks by "
                "them as no other does. Look for what changes p.grad in one process after the gradients were "
                "averaged, or for a faulty device; and go on from the last checkpoint."
            )


_ALONE = (
    "Processes that train each for itself must not share a process group "
    "(torch.distributed.init_process_group)."
)


def _trains_whole(optimizer: torch.optim.Optimizer) -> bool:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return any(p.requires_grad and not is_cut(p) for p in held)


def _is_finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(tensor.isfinite().all())


def _some(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(map(repr, names[:3]))}{more}"
