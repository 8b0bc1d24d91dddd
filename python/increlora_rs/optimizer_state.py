"""Keeps an optimizer's state in step with a parameter that grew or shrank in place."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from .untraced import untraced

# Parameters that ever changed their size in place and how often any did, for the net below; and for
# each optimizer that number at its last look, with the state that it looked at.
_resized_parameters = WeakIdKeyDictionary()
_resizes = 0
_seen: WeakKeyDictionary[torch.optim.Optimizer, tuple[int, Any]] = WeakKeyDictionary()
_net: Any = None


def resize_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, dim: int) -> None:
    """Gives every state tensor of ``parameter`` its new size along ``dim``.

    Rows are cut off, or zeros appended, at the end, as the parameter's were. Scalars stay. State
    that is neither a scalar nor of the parameter's shape (Adafactor's factors, quantised moments)
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


def watch(parameter: nn.Parameter) -> None:
    """Notes that ``parameter`` changed its size, for optimizers that no scheduler looks after.

    Before any optimizer's step, state of such a parameter that has another shape is dropped with a
    warning: fused AdamW would write past the end of it.
    """
    global _net, _resizes
    _resizes += 1
    if _net is None:
        _net = register_optimizer_step_pre_hook(_drop_misshapen)
    _resized_parameters[parameter] = True


@untraced
def _drop_misshapen(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # Without a new size, and without another state (loading makes a new dictionary), nothing can have
    # come to differ, and a look at every parameter in every step would cost more than the step.
    resizes, state = _seen.get(optimizer, (-1, None))
    if resizes == _resizes and state is optimizer.state:
        return
    _seen[optimizer] = _resizes, optimizer.state
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in _resized_parameters:
                continue
            for key, value in optimizer.state.get(parameter, {}).items():
                elementwise = isinstance(value, Tensor) and value.dim() == 2 and not _is_factor(key)
                if elementwise and value.shape != parameter.shape:
                    warnings.warn(
                        f"the state {key!r} of {type(optimizer).__name__} has shape {tuple(value.shape)} "
                        f"but its parameter {tuple(parameter.shape)}: it changed its rank without the "
                        "optimizer. The parameter's optimizer state starts anew; use "
                        "increlora_rs.attach, or make the optimizer after loading an adapter",
                        UserWarning,
                        stacklevel=2,
                    )
                    del optimizer.state[parameter]
                    break


def _is_factor(key: str) -> bool:
    """Is this a row or column factor, as Adafactor keeps them? One of a parameter with one row or
    column has the parameter's shape by chance."""
    return "row" in key or "col" in key


def _fits(key: str, value: Tensor, parameter: nn.Parameter, dim: int, sizes: set[int]) -> bool:
    """Was ``value`` elementwise? ``sizes`` are the sizes along ``dim`` of the state seen so far."""
    return (
        not _is_factor(key)
        and value.dim() == parameter.dim()
        and value.shape[:dim] == parameter.shape[:dim]
        and value.shape[dim + 1 :] == parameter.shape[dim + 1 :]
        and sizes <= {value.shape[dim]}
    )


def _resized(value: Tensor, size: int, dim: int) -> Tensor:
    missing = size - value.shape[dim]
    if not missing:
        return value
    # A negative number cuts off; dimensions count from the last.
    padding = [0, 0] * (value.dim() - 1 - dim) + [0, missing]
    return torch.constant_pad_nd(value, padding)
