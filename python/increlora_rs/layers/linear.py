"""Adapted linear layers: ``nn.Linear``, quantised ones, and ``Conv1D`` of transformers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..ops.linear import fits_linear
from ..ops.update import Call, LowRank
from .base import AdaptedLayer
from .weight import restore_layout


class Linear(AdaptedLayer):
    """A frozen ``nn.Linear``, or a quantised layer that stands for one, (..., in) to (..., out)."""

    kind: ClassVar[str] = "linear"

    def train(self, mode: bool = True) -> Linear:
        """Sets training or evaluation, as ``torch.nn.Module.train`` does."""
        if mode and self.quantization is not None:
            restore_layout(self.get_base_layer())
        return super().train(mode)

    def _fused(self, x: Tensor, name: str) -> Tensor | None:
        base = self.base_layer
        if not fits_linear(x, base.weight, base.bias):
            return None
        update, call = self._update(name, x)
        return update.with_base(x, base.weight, base.bias, call)

    def _added(self, y: Tensor, x: Tensor, name: str, *, inplace: bool) -> Tensor:
        update, call = self._update(name, x, inplace)
        return update.add(y, self._dropped(x, name), call)

    def _update(self, name: str, x: Tensor, inplace: bool = False) -> tuple[LowRank, Call]:
        """The update of an adapter for x, and how it is called."""
        update = LowRank(*self._factors_in_use(name, x), self._scale(name))
        return update, Call(self._dropout(name), self.probes[name], self.slots[name], inplace)


class TransposedLinear(Linear):
    """A frozen ``Conv1D`` of transformers, GPT-2's linear layer, whose weight is (in, out)."""

    kind: ClassVar[str] = "transposed"

    def _fused(self, x: Tensor, name: str) -> Tensor | None:
        base = self.base_layer
        if not fits_linear(x, base.weight, base.bias, transposed=True):
            return None
        update, call = self._update(name, x)
        return update.with_base(x, base.weight.t(), base.bias, call)

    def _as_weight(self, delta: Tensor) -> Tensor:
        return delta.t()
