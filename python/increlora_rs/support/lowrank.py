"""The singular values of a product of two thin matrices, found in the small space between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this part of the largest, a singular value of float32 factors is rounding.
_ROUNDING = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Svd:
    """``u diag(s) v``: u (out, n) with orthonormal columns, v (n, in) with orthonormal rows, s (n,)
    falling; float64."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def rank(self) -> int:
        """Number of singular values that are not rounding, at least 1 where there are any."""
        if not len(self.s):
            return 0
        return max(int((self.s > self.s[0] * _ROUNDING).sum()), 1)

    def first(self, rank: int) -> Svd:
        """The nearest product of rank ``rank``."""
        return Svd(self.u[:, :rank], self.s[:rank], self.v[:rank])

    def norm_beyond(self, rank: int) -> float:
        """Frobenius norm of what ``first(rank)`` leaves out."""
        return float(self.s[rank:].norm())


def svd_of_product(b: Tensor, a: Tensor) -> Svd:
    """The singular value decomposition of ``B A``, which is never formed.

    Args:
        b: (out, r).
        a: (r, in).

    Returns:
        min(out, r, in) singular values and vectors, on the device of the factors.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return Svd(q_b @ u, s, v @ q_a.T)
