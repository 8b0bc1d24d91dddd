"""Parameters of a fixed size, of which the first rows count and the others are 0: the capacity form, for what
lays parameters out once and for all, as FSDP1 does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Tensor, dim: int, size: int) -> Tensor:
    """``rows`` with zeros behind them, ``size`` along ``dim``, in memory of its own."""
    shape = list(rows.shape)
    shape[dim] = size
    value = rows.new_zeros(shape)
    value.narrow(dim, 0, rows.shape[dim]).copy_(rows.detach())
    return value


def moved(value: Tensor, dim: int, kept: Sequence[int]) -> Tensor:
    """The rows at the positions ``kept`` of ``value`` in front, zeros behind them; of the same size."""
    index = torch.tensor(list(kept), dtype=torch.int64, device=value.device)
    return padded(value.index_select(dim, index), dim, value.shape[dim])
