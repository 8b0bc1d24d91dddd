"""Keeps an optimizer's state in step with a parameter that grew or shrank in place."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn


def resize_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, dim: int) -> None:
    """Gives every state tensor of ``parameter`` its new size along ``dim``.

    Rows are cut off, or zeros appended, at the end, as the parameter's were. Scalars stay. State
    that has neither the parameter's shape nor one element (Adafactor's factors, quantised moments)
    cannot be kept: it is dropped with a warning and the optimizer starts it anew.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    resized = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or (value.numel() == 1 and value.dim() == 0):
            continue
        if not _fits(value, parameter, dim):
            warnings.warn(
                f"the state {key!r} of {type(optimizer).__name__}, of shape {tuple(value.shape)}, "
                f"cannot follow a parameter that grew to {tuple(parameter.shape)}; the parameter's "
                "optimizer state starts anew",
                UserWarning,
                stacklevel=2,
            )
            del optimizer.state[parameter]
            return
        resized[key] = _resized(value, parameter.shape[dim], dim)
    state.update(resized)


def _fits(value: Tensor, parameter: nn.Parameter, dim: int) -> bool:
    return value.dim() == parameter.dim() and all(
        value.shape[i] == parameter.shape[i] for i in range(value.dim()) if i != dim
    )


def _resized(value: Tensor, size: int, dim: int) -> Tensor:
    keep = min(size, value.shape[dim])
    shape = list(value.shape)
    shape[dim] = size
    new = value.new_zeros(shape)
    new.narrow(dim, 0, keep).copy_(value.narrow(dim, 0, keep))
    return new
