"""A block-diagonal update of a linear layer, ``y_i + s B_i (A_i drop(x)_i)`` for n equal slices of x and y
(MELoRA, arXiv 2402.17263): all slices in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import _core
from . import core_op
from .autocast import compute_dtype, without_autocast
from .device import stream
from .modes import readable
from .observed import observed
from .update import Call


@dataclass
class BlockDiagonal:
    """``s blockdiag(B_i A_i)``.

    Args:
        a: A of every slice, (n, r, in / n).
        b: B of every slice, (n, out / n, r).
        scale: The scale s.
    """

    a: Tensor
    b: Tensor
    scale: float

    def add(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        """``y`` (..., out) and the update of x (..., in); see :class:`increlora_rs.ops.update.Update`.

        Raises:
            ValueError: shapes or devices do not fit, or a number is out of range.
            TypeError: a dtype does not fit.
            NotImplementedError: the training has a gauge, to which this update shows nothing.
        """
        if torch.compiler.is_compiling() or not readable(y, x, self.a, self.b):
            return self._add_by_torch(y, x, call)
        return core_op.add(_Op(self.scale), y, x, call, self.a, self.b)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor | None:
        """The layer and its update in one call; None in a graph, which fuses by itself. Raises as
        :meth:`add`."""
        if torch.compiler.is_compiling() or not readable(self.a, self.b):
            return None
        return core_op.with_base(_Op(self.scale), x, weight, bias, call, self.a, self.b)

    def dense(self) -> Tensor:
        """dW (out, in), float32 or wider."""
        a, b = self.lora()
        with without_autocast(a.device.type):
            return b @ a

    def lora(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A (n r, in) and B (out, n r), both block-diagonal, the scale in B; ``dtype`` None: float32 or
        wider."""
        wide = dtype or torch.promote_types(self.a.dtype, torch.float32)
        a, b = self.a.to(wide), self.b.to(wide) * self.scale
        return torch.block_diag(*a), torch.block_diag(*b)

    def _add_by_torch(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        """For graphs, and for tensors of any kind."""
        dtype, slices = compute_dtype(x), self.a.shape[0]
        x = functional.dropout(x, call.dropout) if call.dropout > 0.0 else x
        by_slice = x.to(dtype).unflatten(-1, (slices, -1))
        t = torch.einsum("...ni,nri->...nr", by_slice, self.a.to(dtype))
        update = torch.einsum("...nr,nor->...no", t, (self.b * self.scale).to(dtype)).flatten(-2)
        return (y + observed(update, None, call.probe, call.slot)).to(y.dtype)


@dataclass(frozen=True)
class _Op:
    """The calls into Rust."""

    scale: float
    keeps_x: bool = True

    def forward(self, x: Tensor, parameters: tuple[Tensor, ...], options: dict[str, Any]) -> core_op.Kept:
        a, b = parameters
        return _core.block_diagonal_forward(x, a, b, self.scale, stream=stream(x.device), **options)

    def backward(
        self, gy: Tensor, parameters: tuple[Tensor, ...], given: core_op.Given
    ) -> tuple[Tensor | None, ...]:
        x, t, (a, b) = given.x, given.kept, parameters
        assert x is not None and t is not None
        return _core.block_diagonal_backward(
            gy, x, t, a, b, self.scale, needs_x=given.needs_x, stream=stream(gy.device), **given.options
        )
