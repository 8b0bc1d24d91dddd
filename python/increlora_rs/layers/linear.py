"""Adapted linear layers: ``nn.Linear``, quantised ones, and ``Conv1D`` of transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops import adapter, fits_linear, linear
from .base import AdaptedLayer
from .weight import restore_layout


class Linear(AdaptedLayer):
    """A frozen ``nn.Linear``, or a quantised layer that stands for one, (..., in) to (..., out)."""

    kind: ClassVar[str] = "linear"
    plain_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def train(self, mode: bool = True) -> Linear:
        """Sets training or evaluation, as ``torch.nn.Module.train`` does."""
        if mode and self.quantization is not None:
            restore_layout(self.get_base_layer())
        return super().train(mode)

    def _fused(self, x: Tensor, name: str) -> Tensor | None:
        base = self.base_layer
        if not fits_linear(x, base.weight, base.bias):
            return None
        return linear(x, base.weight, base.bias, **self._arguments(name))

    def _added(self, y: Tensor, x: Tensor, name: str, *, inplace: bool) -> Tensor:
        return adapter(y, x, inplace=inplace, **self._arguments(name))

    def _arguments(self, name: str) -> dict[str, Any]:
        """What the operations take of an adapter."""
        a, b, e = self._factors_in_use(name)
        return {
            "a": a,
            "b": b,
            "e": e,
            "scale": self.scaling[name],
            "dropout": self._dropout(name),
            "probe": self.probes[name],
            "slot": self.slots[name],
        }


class TransposedLinear(Linear):
    """A frozen ``Conv1D`` of transformers, GPT-2's linear layer, whose weight is (in, out)."""

    kind: ClassVar[str] = "transposed"
    plain_types: ClassVar[tuple[type[nn.Module], ...]] = (Conv1D,)

    def _fused(self, x: Tensor, name: str) -> Tensor | None:
        base = self.base_layer
        if not fits_linear(x, base.weight, base.bias, transposed=True):
            return None
        return linear(x, base.weight.t(), base.bias, **self._arguments(name))

    def _as_weight(self, delta: Tensor) -> Tensor:
        return delta.t()
