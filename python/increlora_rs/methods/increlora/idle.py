"""Modules that a step may leave idle, as experts to which no token comes. Such a step tells nothing of them:
it is left out of their scores, which are of the steps that they took part in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...contract.policy import AdaptedModule


class Idle:
    """Which modules took part in a step, on their device, without waiting for it.

    Args:
        modules: The adapted modules, in model order.
    """

    def __init__(self, modules: Sequence[AdaptedModule]) -> None:
        self._modules = modules
        self._device = modules[0].factors[0].device
        #: Indices of those that may be idle.
        self.may_be = [k for k, module in enumerate(modules) if module.layer.may_be_idle]
        self._places = self._index(self.may_be)

    def __bool__(self) -> bool:
        return bool(self.may_be)

    def took_part(self) -> Tensor:
        """Bool (modules), by their gradients, averaged over processes as they are: an expert that no token
        came to has 0 for all of its numbers. Before a regulariser adds to them."""
        result = self._all()
        owners, gradients = [], []
        for k in self.may_be:
            for parameter in self._modules[k].factors:
                if parameter.grad is not None and parameter.numel():
                    owners.append(k)
                    gradients.append(parameter.grad)
        return self._mark(result, owners, gradients)

    def in_gauge(self, parts: Sequence[Tensor]) -> Tensor:
        """The same by what the backward passes have added for each of :attr:`may_be`."""
        return self._mark(self._all(), self.may_be, parts)

    def _all(self) -> Tensor:
        result = torch.ones(len(self._modules), dtype=torch.bool, device=self._device)
        result[self._places] = False
        return result

    def _mark(self, result: Tensor, owners: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
        if owners:
            sizes = torch.stack([*torch._foreach_norm(list(tensors), float("inf"))])
            # Of what is not finite, too.
            counts = torch.zeros(len(result), device=self._device)
            counts.index_add_(0, self._index(owners), (sizes != 0.0).to(counts.dtype))
            result |= counts > 0
        return result

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)
