"""A quantised weight is set anew; all else of its module stays: the module itself, bias, hooks, settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

# What every module has: its dictionaries, its hooks, its training flag.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class _Absent:
    """Stands for a name that was not there; a class, so that a copy of it is itself."""


class _Owner:
    """What a backend takes for the layer. It may put another module into it, as HQQ's does, and is not to
    put it into the layer: hooks, and whoever else holds the module, would lose it."""

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    def get_base_layer(self) -> nn.Module:
        return self.base_layer


@dataclass
class Former:
    """What a module held before its weight was set anew, to put it back bit for bit.

    Args:
        held: By the dictionary of the module (see :func:`_dictionaries`) the values that were replaced.
    """

    held: dict[str, dict[str, Any]]

    def put_back(self, base: nn.Module) -> bool:
        """Gives ``base`` its weight back; False, and nothing is done, if it went to another device since."""
        live = _dictionaries(base)
        for key, values in self.held.items():
            for name, value in values.items():
                now = live.get(key, {}).get(name)
                if isinstance(value, Tensor) and isinstance(now, Tensor) and value.device != now.device:
                    return False
        for key, values in self.held.items():
            for name, value in values.items():
                live[key].pop(name, None) if value is _Absent else live[key].update({name: value})
        return True


def weight_of(backend: QuantizationBackend, base: nn.Module) -> Tensor:
    """The weight of ``base`` in floating point.

    Raises:
        ValueError: its library cannot give it.
    """
    with _named(backend):
        return backend.get_base_weight(base)


@contextlib.contextmanager
def _named(backend: QuantizationBackend) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{backend.backend_name} cannot quantise the weight anew, {type(error).__name__}: {error}; load "
            "the base model unquantised to merge."
        ) from error


def set_weight(backend: QuantizationBackend, base: nn.Module, value: Tensor) -> Former:
    """Quantises ``value`` as the weight of ``base`` was, and gives it to ``base``; nothing else changes.

    Raises:
        ValueError: it cannot be quantised so; ``base`` is as it was then.
    """
    with _as_it_was_if_this_fails(base):
        weight, before = getattr(base, "weight", None), _copies(base)
        owner = _Owner(base)
        with _named(backend):
            backend.set_base_weight(owner, value)
        if owner.base_layer is not base:
            _take(base, owner.base_layer)
        made: Any = getattr(base, "weight", None)
        if type(made) is not type(weight):
            raise ValueError(
                f"{backend.backend_name} makes a {type(made).__name__} of the new weight, which was a "
                f"{type(weight).__name__}; load the base model unquantised to merge."
            )
        if isinstance(made, nn.Parameter) and isinstance(weight, nn.Parameter):
            made.requires_grad_(weight.requires_grad)
        # Their order is that of a state_dict and of an optimizer's parameters.
        for name, parameter in before["parameters"].items():
            base._parameters[name] = base._parameters.pop(name, parameter)
        return Former(_replaced(before, _dictionaries(base)))


def _take(base: nn.Module, made: nn.Module) -> None:
    """Gives ``base`` what holds tensors in ``made``, which was built from the weight alone."""
    own = {name: value for name, value in vars(made).items() if name not in _OF_EVERY_MODULE}
    for name, value in (own | made._parameters | made._buffers).items():
        if not _holds_tensors(value):
            continue
        if name in base._parameters and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        setattr(base, name, value)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _dictionaries(base: nn.Module) -> dict[str, dict[str, Any]]:
    """Where a module keeps what it has, those of the objects among its attributes included (bitsandbytes'
    ``state``): the dictionaries themselves."""
    own = vars(base)
    found: dict[str, dict[str, Any]] = {"": own, "parameters": base._parameters, "buffers": base._buffers}
    for name, value in own.items():
        plain = isinstance(value, (dict, Tensor, nn.Module, type)) or callable(value)
        if name not in _OF_EVERY_MODULE and not plain and hasattr(value, "__dict__"):
            found[f".{name}"] = vars(value)
    return found


def _copies(base: nn.Module) -> dict[str, dict[str, Any]]:
    return {key: dict(values) for key, values in _dictionaries(base).items()}


def _replaced(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The former values of what is another object now."""
    found: dict[str, dict[str, Any]] = {}
    for key, values in before.items():
        held = now.get(key, {})
        names = dict.fromkeys([*values, *held])
        found[key] = {
            name: values.get(name, _Absent)
            for name in names
            if values.get(name, _Absent) is not held.get(name, _Absent)
        }
    return found


@contextlib.contextmanager
def _as_it_was_if_this_fails(base: nn.Module) -> Iterator[None]:
    before = _copies(base)
    weight = getattr(base, "weight", None)
    # bitsandbytes' backend uses up the attributes of the old weight, which another module may share.
    attributes = dict(vars(weight)) if isinstance(weight, Tensor) else {}
    try:
        with torch.no_grad():
            yield
    except Exception:
        for key, values in before.items():
            live = _dictionaries(base)[key]
            live.clear()
            live.update(values)
        raise
    finally:
        if attributes:
            vars(weight).clear()
            vars(weight).update(attributes)
