"""Adapted linear layers: ``nn.Linear``, quantised ones, and ``Conv1D`` of transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..ops import torch_ops
from ..ops.linear import adapter, fits_linear, linear
from ..ops.modes import readable
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
        return linear(x, base.weight, base.bias, **self._arguments(name, x))

    def _added(self, y: Tensor, x: Tensor, name: str, *, inplace: bool) -> Tensor:
        arguments = self._arguments(name, x)
        x = self._dropped(x, name)
        if not readable(y, x, arguments["a"]):
            return torch_ops.linear(y, x, **arguments)
        return adapter(y, x, inplace=inplace, **arguments)

    def _arguments(self, name: str, x: Tensor) -> dict[str, Any]:
        """What the operations take of an adapter, for x."""
        update: Any = self._update_in_use(name, x)
        return {
            "a": update.a,
            "b": update.b,
            "e": update.e,
            "scale": update.scale,
            "dropout": self._dropout(name),
            "probe": self.probes[name],
            "slot": self.slots[name],
        }


class TransposedLinear(Linear):
    """A frozen ``Conv1D`` of transformers, GPT-2's linear layer, whose weight is (in, out)."""

    kind: ClassVar[str] = "transposed"

    def _fused(self, x: Tensor, name: str) -> Tensor | None:
        base = self.base_layer
        if not fits_linear(x, base.weight, base.bias, transposed=True):
            return None
        return linear(x, base.weight.t(), base.bias, **self._arguments(name, x))

    def _as_weight(self, delta: Tensor) -> Tensor:
        return delta.t()
