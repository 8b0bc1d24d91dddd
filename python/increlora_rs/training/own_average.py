"""Gradients that nobody else averages, averaged over the processes by this training: those of an adapter that
was left out of a base's sharding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .distributed import average_, from_first_


class GradientAverage:
    """The mean over the processes, in one buffer, when a backward pass is over: before anybody clips.

    A mean of what is equal already changes nothing, and gradients that are accumulated add up in front of it,
    so it does not matter how often it is taken, nor whether the user's script averages as well.

    Args:
        optimizer: What it holds that is whole is averaged.
        wanted: Asked at the end of a backward pass: is it one to average after? Else the next one, or the
            step, does.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, wanted: Callable[[], bool]) -> None:
        self._optimizer, self._wanted = optimizer, wanted
        # Was the mean taken of all that is in the gradients? And is an end of the pass at hand awaited?
        self._taken = self._awaited = False
        self._handles = [p.register_post_accumulate_grad_hook(self._note) for p in self._parameters()]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def share_values(self) -> None:
        """Gives all processes the first one's parameters, as DistributedDataParallel does when it is made."""
        with torch.no_grad():
            for parameter in self._parameters():
                value = parameter.detach().contiguous()
                from_first_(value)
                parameter.copy_(value)

    def finish(self) -> None:
        """Before a step: takes the mean where no backward pass did."""
        if not self._taken:
            self._take()
        self._taken = False

    def _note(self, _: Tensor) -> None:
        self._taken = False
        if not self._awaited:
            self._awaited = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._awaited = False
        if self._wanted():
            self._take()

    @torch.no_grad()
    def _take(self) -> None:
        self._taken = True
        parameters = list(self._parameters())
        gradients = [parameter.grad for parameter in parameters]
        present = [gradient is not None for gradient in gradients]
        flat = _flat(parameters, gradients)
        average_(flat)
        *parts, reached = flat.split([parameter.numel() for parameter in parameters] + [len(parameters)])
        # In a process that did not reach a parameter others may have; looking waits for the device.
        anywhere = present if all(present) else (reached > 0).tolist()
        for parameter, gradient, part, some in zip(parameters, gradients, parts, anywhere, strict=True):
            if gradient is not None and not gradient.is_sparse:
                gradient.copy_(part.view_as(gradient))
            elif some:
                parameter.grad = part.view_as(parameter).to(parameter.device, parameter.dtype)

    def _parameters(self) -> Iterator[nn.Parameter]:
        held = itertools.chain.from_iterable(group["params"] for group in self._optimizer.param_groups)
        # Those that are sharded are FSDP's.
        return (p for p in held if p.requires_grad and not isinstance(p, DTensor))


def _flat(parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> Tensor:
    """All gradients one behind the other, 0 for what is missing; then a number each: is it there?"""
    wide = torch.float64 if any(p.dtype is torch.float64 for p in parameters) else torch.float32
    device = parameters[0].device
    parts = [
        torch.zeros(parameter.numel(), dtype=wide, device=device)
        if gradient is None
        else gradient.to_dense().reshape(-1).to(device, wide)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    present = [float(gradient is not None) for gradient in gradients]
    return torch.cat([*parts, torch.tensor(present, dtype=wide, device=device)])
