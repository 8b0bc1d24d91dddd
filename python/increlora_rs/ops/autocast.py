"""What autocast asks of the adapter's operations: a dtype, settled before Rust is called."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocasts(device_type: str) -> bool:
    """Does autocast change the dtype of operations on such a device? Not on one that it does not know, as
    ``meta``, where torch raises."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Context in which Rust's matrix products keep the dtype that they are given."""
    if autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products with ``x``."""
    device_type = x.device.type
    # As autocast itself does, which leaves float64 and whole numbers as they are.
    cast = x.is_floating_point() and x.dtype != torch.float64
    if cast and autocasts(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def as_autocast(tensor: Tensor) -> Tensor:
    """``tensor`` as a matrix product takes it."""
    return tensor.to(compute_dtype(tensor))
