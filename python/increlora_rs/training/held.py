"""What an average of the weights holds of an adapter: which tensor is of which factor, and its next size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import AdaptedLayer
from ..layers.factor import Factor
from ..resizing.room import padded
from ..support.names import short
from .events import GrowthEvent, Resize
from .modules import AdaptedModule

# Where objects keep what they average: lists by parameter (diffusers, torch_ema) with what was put aside
# while the average is in use, or a model (timm, ema_pytorch, Lightning).
_LISTS = ("shadow_params", "temp_stored_params", "collected_params")
_MODELS = ("_average_model", "ema_model", "module", "ema")


def held_by(
    average: Any,
    model: nn.Module,
    modules: Sequence[AdaptedModule],
    parameters: list[nn.Parameter] | None = None,
) -> list[Held]:
    """The parts of ``average`` that belong to ``modules`` of ``model``.

    Raises:
        ValueError: there are none, it is not clear which they are, or they have other sizes.
        TypeError: ``average`` is nothing that holds an average.
    """
    return checked(parts_of(average, model, modules, parameters))


def parts_of(
    average: Any,
    model: nn.Module,
    modules: Sequence[AdaptedModule],
    parameters: list[nn.Parameter] | None = None,
) -> list[Held]:
    """As :func:`held_by`, whatever sizes they have."""
    if callable(average) and not isinstance(average, nn.Module) and not hasattr(average, "shadow_params"):
        average = average()
    found = list(_parts(average, model, modules, parameters))
    if not found:
        raise ValueError(
            f"average: a {type(average).__name__} holds nothing of the adapter {modules[0].adapter!r} that "
            f"grows, {modules[0].name!r} the first of its modules; give a copy of the model that was given "
            "to attach, or its tensors by name."
        )
    return found


def checked(found: list[Held]) -> list[Held]:
    """``found``, if it has the sizes that it is to have."""
    tensors = [held for held in found if isinstance(held, HeldTensor)]
    # All or none: where a module is full, its rows that count have the same shape.
    in_room = bool(tensors) and all(tensor.fills_room() for tensor in tensors)
    for held in found:
        if isinstance(held, HeldTensor):
            held.in_room = in_room
        held.check()
    return found


def _parts(
    average: Any,
    model: nn.Module,
    modules: Sequence[AdaptedModule],
    parameters: list[nn.Parameter] | None,
) -> Iterator[Held]:
    lists = [value for name in _LISTS if (value := getattr(average, name, None)) is not None]
    if lists and not isinstance(average, nn.Module):
        for tensors in lists:
            yield from _in_list(tensors, model, modules, parameters)
    elif isinstance(average, (list, tuple)):
        yield from _in_list(average, model, modules, parameters)
    elif parameters is not None:
        raise ValueError(
            f"parameters: they say what a list is of, but average is a {type(average).__name__}; leave them "
            "out."
        )
    elif isinstance(average, nn.Module):
        yield from _in_model(average, modules)
    elif isinstance(average, Mapping):
        yield from _in_mapping(average, modules)
    else:
        inner = [value for name in _MODELS if isinstance(value := getattr(average, name, None), nn.Module)]
        if not inner:
            raise TypeError(
                f"average: a {type(average).__name__} holds no average that is known here, or none yet; give "
                "a copy of the model, a dictionary from name to tensor, or a list of tensors."
            )
        yield from _in_model(inner[0], modules)


def _in_model(average: nn.Module, modules: Sequence[AdaptedModule]) -> Iterator[Held]:
    adapter = modules[0].adapter
    own = {id(module.layer) for module in modules}
    layers = {
        name: layer
        for name, layer in average.named_modules()
        if isinstance(layer, AdaptedLayer) and adapter in layer.r and id(layer) not in own
    }
    for name, k in _places(layers, modules).items():
        yield HeldLayer(modules[k], AdaptedModule(name, layers[name], adapter))


def _in_mapping(average: Mapping[Any, Any], modules: Sequence[AdaptedModule]) -> Iterator[Held]:
    adapter, names = modules[0].adapter, modules[0].structure.names
    # A factor in a dictionary: `named_parameters()`, a state_dict, or PEFT's own, without the adapter's name.
    of_factor = re.compile(rf"^(?P<module>.*)\.(?P<factor>{'|'.join(names)})(?P<rest>(?:\..*)?)$")
    found: dict[str, list[tuple[str, int, bool]]] = {}
    for key in average:
        match = of_factor.match(key) if isinstance(key, str) else None
        if match is None:
            continue
        rest = match["rest"].removesuffix(".weight").lstrip(".")
        if rest in ("", adapter) and isinstance(average[key], Tensor):
            entry = (key, names.index(match["factor"]), not rest)
            found.setdefault(match["module"], []).append(entry)
    for name, k in _places(found, modules).items():
        for key, factor, active_only in found[name]:
            yield HeldTensor(modules[k], factor, average[key], f"tensor {key!r}", active_only)


def _in_list(
    tensors: Sequence[Any],
    model: nn.Module,
    modules: Sequence[AdaptedModule],
    parameters: list[nn.Parameter] | None,
) -> Iterator[Held]:
    ours = {
        id(parameter): (k, factor)
        for k, module in enumerate(modules)
        for factor, parameter in enumerate(module.trained)
    }
    everything = list(model.parameters())
    orders = [
        everything,
        [parameter for parameter in everything if parameter.requires_grad],
        [parameter for parameter in everything if id(parameter) in ours],
    ]
    if parameters is not None:
        orders = [parameters]
    order = next((order for order in orders if len(order) == len(tensors)), None)
    if order is None:
        raise ValueError(
            f"average: it has {len(tensors)} tensors, but `parameters`, or else the model in all, trainable "
            f"and in its adapter, {' and '.join(str(len(order)) for order in orders)}; give the parameters "
            "that the list was made of as `parameters`."
        )
    for i, (tensor, parameter) in enumerate(zip(tensors, order, strict=True)):
        if id(parameter) in ours:
            k, factor = ours[id(parameter)]
            yield HeldTensor(modules[k], factor, tensor, f"tensor {i} of the list")


def _places(names: Iterable[str], modules: Sequence[AdaptedModule]) -> dict[str, int]:
    """Which of ``modules`` each name is of: the one of the longest name that it ends with, behind the
    name of whatever the model is in.

    Raises:
        ValueError: two names are of one module.
    """
    numbers = {module.name: k for k, module in enumerate(modules)}
    found: dict[str, int] = {}
    taken: dict[int, str] = {}
    for name in names:
        parts = short(name).split(".")
        endings = (".".join(parts[start:]) for start in range(len(parts)))
        k = next((numbers[ending] for ending in endings if ending in numbers), None)
        if k is None:
            continue
        if k in taken:
            raise ValueError(
                f"average: both {taken[k]!r} and {name!r} may be the average of {modules[k].name!r}; give "
                "the copy of the adapted model alone, such as averaged.module.student."
            )
        found[name], taken[k] = k, name
    return found


@dataclass
class HeldTensor:
    """A tensor that is the average of one factor of a module.

    Args:
        module: The module as it is trained.
        factor: Which of the module's ``factors``.
        tensor: The average.
        what: What it is called in messages.
        active_only: Is it without the components in reserve?
        in_room: Is it laid out in the capacity form: of the parameter's fixed size, 0 past the rows that
            count?
        of: Of a copy in that form, what says how many rows count.
        piece: Where each process holds a piece, that of this process, and ``tensor`` is the whole.
    """

    module: AdaptedModule
    factor: int
    tensor: Tensor
    what: str
    active_only: bool = False
    in_room: bool = False
    of: Factor | None = None
    piece: Tensor | None = None

    @property
    def given(self) -> Tensor:
        """What the average itself holds."""
        return self.tensor if self.piece is None else self.piece

    @property
    def _dim(self) -> int:
        return self.module.dims[self.factor]

    @property
    def _name(self) -> str:
        name: str = self.module.structure.names[self.factor]
        return name

    @property
    def holder(self) -> Factor:
        """What holds the parameter that it is the average of."""
        return self.module.layer.held_factors(self.module.adapter)[self.factor]

    @property
    def size(self) -> int:
        """Rows, or rank, of the adapter that the tensor is to have."""
        return self.module.rank if self.active_only else self.module.sizes[self.factor]

    @property
    def size_now(self) -> int:
        """Rows that the tensor has; of one that is laid out in the capacity form, those up to the last that
        is not 0, unless a copy says how many."""
        if self.of is not None and self.of.room is not None:
            return self.of.rows
        if not self.in_room:
            return int(self.tensor.shape[self._dim])
        there = torch.nonzero(self.tensor.detach().ne(0).any(1 - self._dim))
        return 0 if not len(there) else int(there[-1]) + 1

    def fills_room(self) -> bool:
        """Has it the shape of a parameter in the capacity form?"""
        factor = self.holder
        return factor.room is not None and tuple(self.tensor.shape) == factor.room

    def has(self, size: int) -> bool:
        """Has it so many rows, as far as it tells? Where 0 is what a new row begins with, it may have more
        than it shows."""
        now = self.size_now
        shows_all = not self.in_room or self.of is not None
        return now == size or (not shows_all and now < size and self._name in self.module.structure.silencing)

    def check(self) -> None:
        """Raises ValueError unless the tensor differs from its parameter by rows alone."""
        parameter, dim, _ = self.module.parameters[self.factor]
        if self.given is self.module.trained[self.factor]:
            raise ValueError(
                f"average: the {self.what} is the trained parameter itself; an average needs a copy, as by "
                "p.detach().clone()."
            )
        want, got = list(parameter.shape), list(self.tensor.shape)
        if len(want) != len(got) or want[1 - dim] != got[1 - dim]:
            raise ValueError(
                f"average: the {self.what} has shape {tuple(got)}, but is to be the average of "
                f"{self._name} of {self.module.name!r}, {tuple(want)}; give the parameters "
                "that a list was made of as `parameters`."
            )

    def out_of_step(self) -> bool:
        """Has it another number of rows than it is to have?"""
        return not self.has(self.size)

    def followed(self, step: int, event: GrowthEvent | None) -> Tensor | None:
        """The value with the rows of now; None where it has them.

        Raises:
            ValueError: it has more rows than the adapter had.
        """
        parameter, dim, births = self.module.parameters[self.factor]
        wanted = self.size
        resize = None if event is None else self._resize(event)
        told = wanted if resize is None else resize.old_size
        size = told if self.has(told) else self.size_now
        old = self.tensor.detach().narrow(dim, 0, size)
        was = size if resize is None else told
        if size == wanted and (resize is None or size != was):
            return None
        if size > wanted and (resize is None or size != was):
            raise ValueError(
                f"average: the {self.what} has {size} rows, but the adapter has {wanted} at "
                f"{self.module.name!r}; load the average and the adapter of the same checkpoint."
            )
        # One of an earlier state has the first of the rows that were there.
        places = range(size) if resize is None or size > was else resize.kept
        kept = [place for place in places if place < size]
        if self._name in self.module.structure.rescaled:
            if resize is not None and size == was:
                old = old * resize.factor
            else:
                old = old * self.module.rescaled_by_growth(size, wanted)
        if len(kept) < size:
            old = old.index_select(dim, torch.tensor(kept, dtype=torch.int64, device=old.device))
        new = parameter.detach().narrow(dim, len(kept), wanted - len(kept)).to(old, copy=True)
        if self._name in self.module.structure.silencing:
            # An older component takes part in no average so far.
            older = [i for i, birth in enumerate(births[len(kept) : wanted]) if birth != step]
            new[:, older] = 0.0
        return torch.cat([old, new], dim)

    def _resize(self, event: GrowthEvent) -> Resize | None:
        """What became of its rows."""
        name, structure = self._name, self.module.structure
        if self.active_only and structure.active_only:
            # Those of a parameter that has no others.
            name = next(iter(structure.active_only))
        parameter = self.module.trained[structure.names.index(name)]
        return next((resize for resize in event.resizes if resize.parameter is parameter), None)

    def current(self) -> Tensor:
        """The value of the adapter itself."""
        parameter, dim, _ = self.module.parameters[self.factor]
        return parameter.detach().narrow(dim, 0, self.size).to(self.tensor, copy=True)

    def follow(self, step: int, event: GrowthEvent | None = None) -> None:
        """Takes its rows of now, for ``event`` once."""
        if event is None or _first_time(event, self.given):
            self._set(self.followed(step, event))

    def restart(self) -> None:
        """Takes the adapter's values."""
        self._set(self.current())

    def _set(self, value: Tensor | None) -> None:
        if value is None:
            return
        if self.in_room:
            with torch.no_grad():
                self.tensor.copy_(padded(value, self._dim, self.tensor.shape[self._dim]))
            return
        if self.tensor.is_pinned():
            value = value.pin_memory()
        # In place: lists made of the tensors before stay right.
        with torch.no_grad():
            # torch's stub has no overload for a tensor.
            self.tensor.set_(value)  # type: ignore[call-overload]


@dataclass
class HeldLayer:
    """A layer of a copy of the model.

    Args:
        module: The module as it is trained.
        copy: The layer that is its average.
    """

    module: AdaptedModule
    copy: AdaptedModule

    def _tensors(self) -> list[HeldTensor]:
        what = f"module {self.copy.name!r}"
        held = self.copy.layer.held_factors(self.copy.adapter)
        return [
            HeldTensor(self.module, k, factor.weight, what, in_room=factor.room is not None, of=factor)
            for k, factor in enumerate(held)
        ]

    def is_part(self) -> bool:
        """Has this process but a part of the copy?"""
        return any(factor.is_part() for factor in self.copy.layer.held_factors(self.copy.adapter))

    def check(self) -> None:
        """Raises ValueError unless the layer differs from the trained one by rows alone."""
        for tensor in self._tensors():
            tensor.check()

    def out_of_step(self) -> bool:
        """Has it other numbers of rows than the trained layer?"""
        return any(tensor.out_of_step() for tensor in self._tensors())

    def follow(self, step: int, event: GrowthEvent | None = None) -> None:
        """Takes its rows of now, for ``event`` once."""
        tensors = self._tensors()
        first = [event is None or _first_time(event, tensor.tensor) for tensor in tensors]
        if all(first):
            self._set([tensor.followed(step, event) for tensor in tensors])

    def restart(self) -> None:
        """Takes the adapter's values."""
        self._set([parameter.detach() for parameter, _, _ in self.module.parameters])

    def _set(self, values: list[Tensor | None]) -> None:
        layer, adapter, module = self.copy.layer, self.copy.adapter, self.module
        # What is saved beside the adapter.
        layer.configs[adapter].rank_pattern = module.layer.configs[module.adapter].rank_pattern
        layer.probes[adapter].history = module.layer.probes[module.adapter].history
        if all(value is None for value in values):
            return
        factors = layer.held_factors(adapter)
        kept = [
            factor.counted().detach().clone() if value is None else value
            for value, factor in zip(values, factors, strict=True)
        ]
        shapes = [tuple(parameter.shape) for parameter in module.factors]
        layer.take_sizes(adapter, dict(zip(module.structure.names, shapes, strict=True)))
        with torch.no_grad():
            for value, factor in zip(kept, factors, strict=True):
                room = factor.room
                factor.weight.copy_(value if room is None else padded(value, factor.dim, room[factor.dim]))


Held = HeldTensor | HeldLayer


def _first_time(event: GrowthEvent, tensor: Tensor) -> bool:
    """Has ``tensor`` not followed ``event`` yet? Two may look after one average."""
    first = id(tensor) not in event.followed
    event.followed.add(id(tensor))
    return first
