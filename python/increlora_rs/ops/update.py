"""An update of a frozen weight as it stands in one forward pass, and what that pass asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..resizing.graph import is_zero, may_differ
from .autocast import without_autocast
from .linear import add_by_torch, add_low_rank, low_rank_linear, show_gradient
from .modes import readable
from .probe import Probe
from .untouched import Show, untouched


@dataclass
class Call:
    """How an update is called.

    Args:
        dropout: Probability with which an element of x is dropped.
        probe: Has the backward pass add to its gauge where it is armed.
        slot: The module's, in the gauge.
        inplace: May y be overwritten?
    """

    dropout: float = 0.0
    probe: Probe | None = None
    slot: int = 0
    inplace: bool = False


class Update(Protocol):
    """What a linear layer takes of any update; none forms dW in a pass."""

    def add(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        """``y`` (..., out) and the update of x (..., in), of the shape and dtype of y.

        It drops x as ``call`` says, and computes as autocast does (:mod:`increlora_rs.ops.autocast`). What
        torch's own operations compute goes through :func:`increlora_rs.ops.observed.observed`, which tells a
        training that lacks its policy.
        """
        ...

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor | None:
        """The frozen linear layer of ``weight`` (out, in) and the update in one operation, (..., out); None
        where there is none. For what :func:`increlora_rs.ops.linear.fits_linear` lets through."""
        ...

    def dense(self) -> Tensor:
        """dW (out, in), float32 or wider."""
        ...

    def lora(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor] | None:
        """A (rank, in) and B (out, rank) of the LoRA of scale 1 that does the same, in ``dtype`` (None:
        float32 or wider); None where no LoRA does."""
        ...


@dataclass
class LowRank:
    """``s B diag(E) A``, thin factors (arXiv 2308.12043, eq. 3); without any component, 0.

    Args:
        a: Right vectors A, (rows, in).
        b: Left vectors B, (out, rows).
        e: Singular values E of the active components, (active, 1), active <= rows; further rows of A and B
            are in reserve and count with ``RESERVE_E``.
        scale: The scale s; while torch.compile traces also float64 (1) that holds it.
    """

    a: Tensor
    b: Tensor
    e: Tensor
    scale: float | Tensor

    @property
    def is_empty(self) -> bool:
        """Is there no component, so that the base layer alone is the layer? False too in a graph that does
        not know it: its operations take any number."""
        return is_zero(self.a.shape[0])

    def leave(self, y: Tensor, x: Tensor, call: Call, show: Show) -> Tensor:
        """``y`` where there is no component; see :func:`increlora_rs.ops.untouched.untouched`."""
        factors = self.a, self.b, self.e
        return untouched(y, x, factors, call.probe, call.slot, show, inplace=call.inplace)

    def add(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        """``y + s B (E * (A drop(x)))``; without any component ``y`` itself.

        Raises:
            ValueError: shapes or devices do not fit, or a number is out of range.
            TypeError: a dtype does not fit.
        """
        if self.is_empty:
            return self.leave(y, x, call, show_gradient)
        if readable(y, x, self.a):
            return add_low_rank(
                y,
                x,
                self.a,
                self.b,
                self.e,
                scale=self.scale,
                dropout=call.dropout,
                inplace=call.inplace,
                probe=call.probe,
                slot=call.slot,
            )
        return add_by_torch(
            y,
            x,
            self.a,
            self.b,
            self.e,
            scale=self.scale,
            dropout=call.dropout,
            probe=call.probe,
            slot=call.slot,
        )

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor | None:
        """``x W^T + bias + s B (E * (A drop(x)))``; None without any component.

        Raises:
            ValueError: shapes or devices do not fit, or a number is out of range.
            TypeError: a dtype does not fit.
        """
        if self.is_empty:
            return None
        return low_rank_linear(
            x,
            weight,
            bias,
            self.a,
            self.b,
            self.e,
            scale=self.scale,
            dropout=call.dropout,
            probe=call.probe,
            slot=call.slot,
        )

    def dense(self) -> Tensor:
        """dW (out, in) of the active components, float32 or wider."""
        a, b, e = self._active()
        # A merge within autocast must not round what it writes for good.
        with without_autocast(a.device.type):
            return (b * e) @ a * self.scale

    def lora(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A (active, in) and B (out, active) with E and the scale in B; ``dtype`` None: float32 or wider."""
        a, b, e = self._active(dtype)
        return a, b * (e * self.scale)

    def _active(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        a, b, e = self.a, self.b, self.e
        active = e.shape[0]
        if may_differ(a.shape[0], active):
            a, b = a[:active], b[:, :active]
        wide = dtype or torch.promote_types(a.dtype, torch.float32)
        return a.to(wide), b.to(wide), e.to(wide).view(-1)
