"""Adapted linear layers: ``nn.Linear``, quantised ones, and ``Conv1D`` of transformers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..ops.linear import fits_linear
from .base import AdaptedLayer
from .shown import of_base
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
        return self.update_in_use(name, x).with_base(x, base.weight, base.bias, self._call(name))

    def _added(self, y: Tensor, x: Tensor, name: str, *, inplace: bool) -> Tensor:
        return self.update_in_use(name, x).add(y, self._dropped(x, name), self._call(name, inplace))


class TransposedLinear(Linear):
    """A frozen ``Conv1D`` of transformers, GPT-2's linear layer, whose weight is (in, out)."""

    kind: ClassVar[str] = "transposed"

    nx = of_base("nx")
    nf = of_base("nf")

    def _fused(self, x: Tensor, name: str) -> Tensor | None:
        base = self.base_layer
        if not fits_linear(x, base.weight, base.bias, transposed=True):
            return None
        update = self.update_in_use(name, x)
        return update.with_base(x, base.weight.t(), base.bias, self._call(name))

    def _as_weight(self, delta: Tensor) -> Tensor:
        return delta.t()

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The base weight as the matrix (out, in)."""
        return weight.t()
