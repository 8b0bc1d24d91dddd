"""Means of losses."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_loss(values: list[Tensor]) -> float:
    """The mean of losses of batches of one size."""
    return float(torch.stack(values).double().mean())
