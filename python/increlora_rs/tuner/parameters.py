"""``target_parameters``: finds the parameters that it names, as PEFT does, and puts adapted ones in their
place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..contract.config import MethodConfig
from ..layers import AdaptedLayer
from ..layers.parameters import AdaptedMatrix, AdaptedParameters, Matrix, adapt_parameter

_BASE = ".base_layer"


class Found(NamedTuple):
    """A parameter that is named.

    Args:
        module: Full name of the module that holds it, or of what was put in that module's place.
        name: Its name in there.
        holder: The module that holds it.
    """

    module: str
    name: str
    holder: nn.Module

    @property
    def full_name(self) -> str:
        """The parameter's name in the base model."""
        return f"{self.module}.{self.name}"


def parameters_of(model: nn.Module, config: MethodConfig) -> list[Found]:
    """The parameters that ``target_parameters`` names, by their full name or its end, in model order.

    Raises:
        ValueError: a name is of none, or of one that cannot be adapted by it.
    """
    wanted, found = sorted(set(config.target_parameters or ())), []
    matched: set[str] = set()
    names: list[str] = []
    for module, name, holder in _parameters(model):
        full = f"{module}.{name}" if module else name
        names.append(full)
        targets = config.parameter_targets(full)
        if not targets:
            continue
        matched |= targets
        _check(model, module, full)
        found.append(Found(module, name, holder))
    unknown = [one for one in wanted if one not in matched]
    if unknown:
        raise ValueError(f"target_parameters: {unknown} are the names of no parameter; {_others(names)}")
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Module, name and holder of each parameter of the base model, by the names that they have there."""
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    for path, module in model.named_modules():
        inside = f"{path}.".startswith(layers)
        if inside and not path.endswith(_BASE):
            continue
        base = path.removesuffix(_BASE)
        for name, _ in module.named_parameters(recurse=False):
            yield base, name, module


def _check(model: nn.Module, module: str, full_name: str) -> None:
    if not module:
        raise ValueError(
            f"target_parameters: {full_name!r} is a parameter of the model itself, in whose place nothing "
            "can be put; give the model as a module of another."
        )
    if isinstance(model.get_submodule(module), AdaptedLayer):
        raise ValueError(
            f"target_parameters: {full_name!r} is the parameter of a layer that target_modules names; leave "
            "it out of one of the two (target_modules=[] names none)."
        )


def _others(names: Iterable[str]) -> str:
    experts = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names if "expert" in name})
    if not experts:
        return "give the names that model.named_parameters() has, or the ends of such."
    return f"those of experts are {experts}."


def inject_parameters(
    model: nn.Module,
    found: Iterable[Found],
    config: MethodConfig,
    make: Callable[[Matrix, str, int, float], AdaptedMatrix],
    update: Callable[[AdaptedMatrix, int, float], None],
) -> None:
    """Puts an adapter on the parameters.

    Args:
        make: Makes the layer of a matrix, its full name, rank and alpha.
        update: Gives one that is there the adapter, of a rank and alpha.

    Raises:
        ValueError: one of them cannot be adapted; the message names it.
    """
    for one in found:
        try:
            _inject(model, one, config, make, update)
        except ValueError as error:
            raise ValueError(f"target_parameters: {one.full_name}: {error}") from error


def _inject(
    model: nn.Module,
    found: Found,
    config: MethodConfig,
    make: Callable[[Matrix, str, int, float], AdaptedMatrix],
    update: Callable[[AdaptedMatrix, int, float], None],
) -> None:
    place = model.get_submodule(found.module)
    adapted = place if isinstance(place, AdaptedParameters) else AdaptedParameters(place)
    known = adapted.matrices().get(found.name)
    if known is None:

        def made(matrix: Matrix, name: str) -> AdaptedMatrix:
            return make(matrix, name, config.rank_at(name), config.alpha_of(name))

        adapt_parameter(adapted, found.name, found.full_name, made)
    else:
        for matrix in known:
            name = matrix.site.name
            update(matrix, config.rank_at(name), config.alpha_of(name))
    if adapted is not place:
        parent, _, child = found.module.rpartition(".")
        setattr(model.get_submodule(parent), child, adapted)


def adapted_parameters(model: nn.Module, adapter_name: str, short: Callable[[str], str]) -> dict[str, int]:
    """The adapted parameters of an adapter by their full names, in model order, and the number of matrices in
    each; 0 where it is one."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, AdaptedParameters):
            for name in (name for name, _ in module.base_layer.named_parameters(recurse=False)):
                matrices = module.matrices().get(name, [])
                if matrices and adapter_name in matrices[0].adapters:
                    several = matrices[0].may_be_idle
                    found[short(f"{path}.{name}")] = len(matrices) if several else 0
    return found


@contextmanager
def patterns_for_modules(config: Any) -> Iterator[None]:
    """PEFT tells of keys of ``rank_pattern`` and ``alpha_pattern`` that match no module, and counts no
    parameters: in the context they are without those that :func:`set_aside` took."""
    # Where nothing was set aside, a method may have written patterns of its own.
    names = ("rank_pattern", "alpha_pattern") if config.target_parameters else ()
    kept = {name: getattr(config, name) for name in names}
    try:
        yield
    finally:
        for name, pattern in kept.items():
            setattr(config, name, pattern)


def set_aside(config: MethodConfig, found: Iterable[Found], names: Iterable[str]) -> None:
    """Takes the keys out of the patterns that match an adapted parameter or a matrix of one."""
    every = [*(one.full_name for one in found), *names]
    for attribute in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, attribute)
        left = {
            key: value
            for key, value in pattern.items()
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in every)
        }
        setattr(config, attribute, left)
