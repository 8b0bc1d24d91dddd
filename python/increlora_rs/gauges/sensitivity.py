"""The sensitivity of a module, ``sum |dW * G|`` (arXiv 2308.12043, eq. 6), dW = P A its update with
P = s B diag(E), G the gradient for dW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .gauge import Gauge


class Sensitivity(Gauge):
    """One number a module; the operations add it in the calls that compute the gradients."""

    name: ClassVar[str] = "sensitivity"
    fused: ClassVar[bool] = True

    @classmethod
    def of(cls, modules: int, device: torch.device | str = "cpu") -> Sensitivity:
        """That of so many modules, 0."""
        return cls(torch.zeros(modules, dtype=torch.float64, device=device), [1] * modules)

    @classmethod
    def empty(cls, like: Tensor, size: tuple[int, int], given: Sequence[Tensor]) -> Tensor:
        """One number."""
        return like.new_empty(1, dtype=torch.float64)

    @classmethod
    def of_one(cls, total: Tensor, size: tuple[int, int], given: Sequence[Tensor]) -> Sensitivity:
        """That of one module."""
        return cls(total)


def of_lookup(gy: Tensor, ids: Tensor, a: Tensor, scaled_b: Tensor) -> Tensor:
    """That of one pass through an embedding, float64: gy (..., out), A (rows, number of embeddings), P (out,
    rows)."""
    # Rows of dW that no id asks for have no gradient. Those that are asked for, each once: ids in order,
    # numbered without counting them, for which a GPU would have to be waited for.
    in_order, order = ids.flatten().sort()
    number = torch.zeros_like(in_order)
    number[1:] = (in_order[1:] != in_order[:-1]).cumsum(0)
    asked_for = torch.zeros_like(in_order).scatter_(0, number, in_order)
    wide = torch.promote_types(gy.dtype, torch.float32)
    flat = gy.reshape(-1, gy.shape[-1]).to(wide)
    gradient = torch.zeros_like(flat).index_add_(0, number, flat[order])
    delta = a[:, asked_for].t() @ scaled_b.t()
    return (delta * gradient).abs().sum(dtype=torch.float64)


def of_gradient(gradient: Tensor, a: Tensor, scaled_b: Tensor) -> Tensor:
    """That of one pass whose G (out, in) exists, float64."""
    return (scaled_b @ a * gradient).abs().sum(dtype=torch.float64)
