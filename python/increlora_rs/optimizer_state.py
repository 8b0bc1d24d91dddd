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
    resized: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if not _fits(key, value, parameter, dim, {old.shape[dim] for old in resized.values()}):
            warnings.warn(
                f"the state {key!r} of {type(optimizer).__name__}, of shape {tuple(value.shape)}, "
                f"cannot follow a parameter that grew to {tuple(parameter.shape)}; the parameter's "
                "optimizer state starts anew",
                UserWarning,
                stacklevel=2,
            )
            del optimizer.state[parameter]
            return
        resized[key] = value
    state.update({key: _resized(value, parameter.shape[dim], dim) for key, value in resized.items()})


def _fits(key: str, value: Tensor, parameter: nn.Parameter, dim: int, sizes: set[int]) -> bool:
    """Was ``value`` elementwise? ``sizes`` are the sizes along ``dim`` of the state seen so far."""
    # Factors of a parameter with one row or column have its shape by chance.
    factor = "row" in key or "col" in key
    return (
        not factor
        and value.dim() == parameter.dim()
        and all(value.shape[i] == parameter.shape[i] for i in range(value.dim()) if i != dim)
        and sizes <= {value.shape[dim]}
    )


def _resized(value: Tensor, size: int, dim: int) -> Tensor:
    keep = min(size, value.shape[dim])
    shape = list(value.shape)
    shape[dim] = size
    new = value.new_zeros(shape)
    new.narrow(dim, 0, keep).copy_(value.narrow(dim, 0, keep))
    return new
