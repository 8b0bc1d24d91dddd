"""An update as it stands in one forward pass, or in a saved adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Update(Protocol):
    """What a method's structure makes of its parameters."""

    def dense(self) -> Tensor:
        """The update as a matrix (out, in), float32 or wider."""

    def lora(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor] | None:
        """A (rank, in) and B (out, rank) with the scale in B, in ``dtype`` (None: float32 or wider); None: no
        LoRA is it."""


@dataclass
class LowRank:
    """``scale * B diag(E) A``.

    Args:
        a: (rows, in).
        b: (out, rows).
        e: (rank, 1); further rows of A and B are in reserve.
        scale: The scale s; in a compiled graph also float64 (1) that holds it.
    """

    a: Tensor
    b: Tensor
    e: Tensor
    scale: Any

    def dense(self) -> Tensor:
        """The update as a matrix (out, in), float32 or wider."""
        wide = torch.promote_types(self.a.dtype, torch.float32)
        dense: Tensor = (self.b.to(wide) * self.e.to(wide).view(-1)) @ self.a.to(wide) * self.scale
        return dense

    def lora(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) with E and the scale in B, in ``dtype`` (None: float32 or wider)."""
        wide = dtype or torch.promote_types(self.a.dtype, torch.float32)
        return self.a.to(wide), self.b.to(wide) * (self.e.to(wide).view(-1) * self.scale)
