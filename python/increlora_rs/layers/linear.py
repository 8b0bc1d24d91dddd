"""Adapted linear layers: ``nn.Linear``, quantised ones, and ``Conv1D`` of transformers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import _core
from ..ops.linear import fits_linear
from .base import AdaptedLayer
from .call import drops_plainly, is_plain_call
from .dora import MAGNITUDE
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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer plus the active adapters' updates."""
        result = None if args or kwargs else self._direct(x)
        return super().forward(x, *args, **kwargs) if result is None else result

    def _direct(self, x: Tensor) -> Tensor | None:
        """The output by one call, where nobody but the base layer and one adapter take part; else None.

        What ``torch.nn.Module.__getattr__`` would look for is read where it lies, anew in every call: it can
        be replaced at any time.
        """
        structure = self.structure
        if not structure.direct or torch.compiler.is_compiling():
            return None
        name = self._only()
        if name is None:
            return None
        modules: Any = self._modules
        base, dropout = modules["base_layer"], modules["lora_dropout"]._modules[name]
        if not is_plain_call(base) or not drops_plainly(dropout) or name in modules[MAGNITUDE]._modules:
            return None
        held = [modules[factor]._modules[name] for factor in structure.names]
        # In the capacity form not all rows count.
        if held[0].room is not None:
            return None
        # Without a parameter of the name, as in FlatParameters of FSDP, there is None, and no direct call.
        a, b, e = (factor._parameters.get("weight") for factor in held)
        if a is None or not a.numel():
            return None
        weight = base._parameters.get("weight")
        if weight is None:
            return None
        return _core.direct_linear(
            x,
            self.as_matrix(weight),
            base._parameters.get("bias"),
            a,
            b,
            e,
            self.training,
            self.scaling[name],
            dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0,
            self.probes[name],
            self.slots[name],
        )

    def _only(self) -> str | None:
        """The adapter that acts, where it is one and nothing else is asked for."""
        if self._disable_adapters or self.merged_adapters:
            return None
        active = self._active_adapter
        if not isinstance(active, str):
            if len(active) != 1:
                return None
            (active,) = active
        return active if active in self.configs else None

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
