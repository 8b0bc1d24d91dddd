"""An update of several parts, of which the first is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .update import Call, Update

# The parts that are not trained see x as it is, as the base layer does, and nobody counts their passes.
_PLAIN = Call(inplace=True)


@dataclass
class Total:
    """The sum of updates of one module.

    Args:
        trained: What learns; dropout is before it alone.
        rest: What stays as it is.
    """

    trained: Update
    rest: list[Update]

    def add(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        """``y`` (..., out) and the updates of x (..., in); raises as the parts do."""
        return self._and_rest(self.trained.add(y, x, call), x)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor | None:
        """The layer and its updates; None where the trained part has no operation for it."""
        y = self.trained.with_base(x, weight, bias, call)
        return None if y is None else self._and_rest(y, x)

    def _and_rest(self, y: Tensor, x: Tensor) -> Tensor:
        for part in self.rest:
            y = part.add(y, x, _PLAIN)
        return y

    def dense(self) -> Tensor:
        """dW (out, in), float32 or wider."""
        return torch.stack([part.dense() for part in (self.trained, *self.rest)]).sum(0)

    def lora(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor] | None:
        """A and B of all parts, one behind the other; None where one has none."""
        factors = [part.lora(dtype) for part in (self.trained, *self.rest)]
        found = [pair for pair in factors if pair is not None]
        if len(found) < len(factors):
            return None
        return torch.cat([a for a, _ in found], 0), torch.cat([b for _, b in found], 1)
