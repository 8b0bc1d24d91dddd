"""The dtype of what is written."""

from __future__ import annotations

import torch
from torch import Tensor


def in_dtype(tensor: Tensor, dtype: torch.dtype, what: str, instead: str) -> Tensor:
    """``tensor`` in ``dtype``.

    Args:
        what: What the tensor is called in the message.
        instead: Dtypes that hold more.

    Raises:
        ValueError: a value is too large for ``dtype``.
    """
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"dtype={dtype}: {what} holds {largest:g}, and the largest number of this dtype is "
            f"{torch.finfo(dtype).max:g}; take {instead}."
        )
    return tensor.to(dtype)
