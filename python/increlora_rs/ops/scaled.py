"""``P = s B diag(E)``, the reserve included, so that dW = P A: what is multiplied by where torch's own
operations do the work of an update."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core import RESERVE_E


def scaled_b(a: Tensor, b: Tensor, e: Tensor, scale: float | Tensor) -> Tensor:
    """P (out, rows) of A (rows, in), B (out, rows), E (active, 1)."""
    return b * (_e_of_all(e, a.shape[0]) * scale)


def through_scaled_b(
    gp: Tensor, a: Tensor, b: Tensor, e: Tensor, scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of B and E from that of P."""
    gb = gp * (_e_of_all(e, a.shape[0]) * scale)
    ge = ((gp * b).sum(0) * scale)[: e.shape[0]]
    return gb, ge.view_as(e)


def _e_of_all(e: Tensor, rows: int) -> Tensor:
    """E with the constant of the reserve."""
    reserve = rows - e.shape[0]
    return torch.cat([e.view(-1), e.new_full((reserve,), RESERVE_E)]) if reserve else e.view(-1)
