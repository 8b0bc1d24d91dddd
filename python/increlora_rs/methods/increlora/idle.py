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
        self._device = modules[0].factors[0].device
        self._count = len(modules)
        #: Indices of those that may be idle.
        self.may_be = [k for k, module in enumerate(modules) if module.layer.may_be_idle]
        # They stay the same objects as they change their size.
        self._values = [modules[k].factors[-1] for k in self.may_be]
        self._places = torch.tensor(self.may_be, dtype=torch.int64, device=self._device)

    def __bool__(self) -> bool:
        return bool(self.may_be)

    def took_part(self) -> Tensor:
        """Bool (modules), by the gradients of E, averaged over processes as they are: an expert that no token
        came to has 0 for all of its components. In a first step that of B = 0 is 0, too, and so is all that
        it does."""
        gradients = [
            value.new_zeros(value.numel()) if value.grad is None else value.grad.view(-1)
            for value in self._values
        ]
        return self._marked(torch.cat(gradients), [len(gradient) for gradient in gradients])

    def in_gauge(self, parts: Sequence[Tensor]) -> Tensor:
        """The same by what the backward passes have added for each of :attr:`may_be`."""
        if not parts:
            return self._marked(torch.zeros(0, device=self._device), [])
        # The largest, whatever the shape; of what is not finite, too.
        sizes = torch.stack([*torch._foreach_norm(list(parts), float("inf"))])
        return self._marked(sizes, [1] * len(parts))

    def _marked(self, numbers: Tensor, lengths: Sequence[int]) -> Tensor:
        """True for modules that are never idle, and for others where one of their ``lengths`` numbers is not
        0."""
        owners = self._places.repeat_interleave(
            torch.tensor(lengths, device=self._device), output_size=len(numbers)
        )
        result = torch.ones(self._count, device=self._device)
        result[self._places] = 0.0
        return result.index_add_(0, owners, (numbers != 0.0).to(result.dtype)) > 0.0
