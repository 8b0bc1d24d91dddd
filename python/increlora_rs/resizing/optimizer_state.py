"""Keeps an optimizer's state in step with a parameter whose rows came or went in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from ..support.untraced import untraced
from ..support.warning import warn
from .optimizer_rows import CannotFollow, Change, fits, is_of_rows
from .optimizer_starts import counted_start, holder, known, outgrown


@dataclass
class _Look:
    """What an optimizer's last look at its state found.

    Args:
        state: The state that was looked at; loading makes another.
        resizes: How often any parameter had changed its size then.
        shapes: The shapes of the parameters that their state is for.
        moves: How often rows had left these parameters then.
        parameters: Those of its parameters that had ever changed their size.
        sizes: Their numbers of elements.
        places: By its id the group that a parameter was found in, and its position there.
    """

    state: Any
    resizes: int = -1
    shapes: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    moves: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    parameters: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)

    def sizes_now(self) -> list[int]:
        """As ``sizes``: ``p.data = other`` changes them, and tells nobody."""
        return [parameter.numel() for parameter in self.parameters]

    def in_step(self, parameter: Tensor) -> bool:
        """Is the state for the parameter's shape and rows?"""
        return self.shapes.get(parameter) == parameter.shape and not self.moved(parameter)

    def moved(self, parameter: Tensor) -> bool:
        """Have rows left the parameter since the last look at its state? What was never looked at may have
        been loaded since."""
        return parameter in self.moves and self.moves[parameter] != _resized_parameters.get(parameter, 0)

    def note(self, parameter: Tensor) -> None:
        """The state is in step."""
        self.shapes[parameter] = parameter.shape
        self.moves[parameter] = _resized_parameters.get(parameter, 0)


# How often rows left each parameter that ever changed its size in place, and how often any changed it, for
# the net below; the last look of each optimizer; and the optimizers around an optimizer.
_resized_parameters = WeakIdKeyDictionary()
_resizes = 0
_looks: WeakKeyDictionary[torch.optim.Optimizer, _Look] = WeakKeyDictionary()
_wrappers: WeakKeyDictionary[torch.optim.Optimizer, list[ref[torch.optim.Optimizer]]] = WeakKeyDictionary()
_net: Any = None


def resize_state(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    dim: int,
    rescaled: float = 1.0,
    kept: Sequence[int] | None = None,
) -> None:
    """Brings the state of ``parameter`` in step with its rows along ``dim``.

    Rows that stayed keep theirs. New ones, which stand at the end, start as the optimizer starts those of a
    new parameter. State of which that is not known, and state that is not a plain tensor with a
    number for each of the parameter's (factors, blocks, quantised moments), cannot be kept: the
    parameter's state is dropped with a warning, and the optimizer starts it anew.

    Args:
        optimizer: The optimizer.
        parameter: The parameter.
        dim: The dimension along which it changed.
        rescaled: What its old rows were multiplied by.
        kept: The old positions of the rows that stayed, in order; None: all, cut off at the end.
    """
    for one in _with_state(optimizer):
        _resize_one(one, parameter, dim, rescaled, kept)


def keep_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Notes that the state of ``parameter`` is in step: rows came and went, and those of before are there."""
    for one in _with_state(optimizer):
        _look(one).note(parameter)


def start_anew(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, counted: int | None = None) -> None:
    """Drops the optimizer's state of a parameter whose values were replaced, or which had no row before.

    Args:
        optimizer: The optimizer.
        parameter: The parameter.
        counted: Steps that Adam, which counts them for each parameter, is to have counted for this one
            already, as for those that were there; None: none.
    """
    for one in _with_state(optimizer):
        _forget(one, parameter)
        _look(one).note(parameter)
        group = _group(one, parameter)
        if counted and group and (start := counted_start(one, parameter, group, counted)):
            one.state[parameter] = start


def note_wrapper(inner: torch.optim.Optimizer, wrapper: torch.optim.Optimizer) -> None:
    """Notes that ``wrapper`` is around ``inner``, for it may have a state of its own (slow weights)."""
    if getattr(wrapper, "state", inner.state) is not inner.state:
        _wrappers.setdefault(inner, []).append(ref(wrapper))


def watch(parameter: nn.Parameter, *, moved: bool = False) -> None:
    """Notes that ``parameter`` changed its size, or that rows left it (``moved``), for optimizers that no
    scheduler looks after.

    Before any optimizer's step, state of such a parameter that is of another shape, or of other rows, is
    dropped with a warning: fused AdamW would write past the end of it.
    """
    global _net, _resizes
    _resizes += 1
    if _net is None:
        _net = register_optimizer_step_pre_hook(_drop_misshapen)
    _resized_parameters[parameter] = _resized_parameters.get(parameter, 0) + moved


def _with_state(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    yield holder(optimizer)
    for wrapper in _wrappers.get(optimizer, ()):
        alive = wrapper()
        if alive is not None:
            yield alive


def _resize_one(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    dim: int,
    rescaled: float,
    kept: Sequence[int] | None,
) -> None:
    look = _look(optimizer)
    if look.shapes.get(parameter) != parameter.shape or rescaled != 1.0 or kept is not None:
        change = Change(parameter, dim, rescaled, _group(optimizer, parameter), kept)
        try:
            resized = _followed(optimizer, change)
        except CannotFollow as why:
            warn(
                f"{why}. The parameter's optimizer state starts anew; docs/optimizers.md names optimizers "
                "that keep theirs, such as torch.optim.AdamW"
            )
            _forget(optimizer, parameter)
        else:
            optimizer.state.get(parameter, {}).update(resized)
    look.note(parameter)


def _followed(optimizer: torch.optim.Optimizer, change: Change) -> dict[str, Tensor]:
    """What changes in the state.

    Raises:
        CannotFollow: with the whole message.
    """
    name, now = type(optimizer).__name__, tuple(change.parameter.shape)
    if _in_groups(optimizer, change.parameter):
        raise CannotFollow(f"the state in the groups of {name} cannot follow a parameter to the shape {now}")
    state, entries = optimizer.state.get(change.parameter, {}), known(optimizer)
    sizes: dict[str, int] = {}
    resized: dict[str, Tensor] = {}
    key = ""
    try:
        for key, value in state.items():
            size = change.old_size(entries.get(key), value)
            if size is not None:
                sizes[key] = size
                if len(set(sizes.values())) > 1:
                    raise CannotFollow("its size is not that of the other keys")
        for key, value in state.items():
            old = sizes.get(key)
            if old is None and sizes and entries[key].is_weights and isinstance(value, Tensor):
                old = next(iter(sizes.values()))
            if old is not None:
                resized[key] = change.follow(entries[key], value, old)
    except CannotFollow as why:
        value = state[key]
        of_shape = f", of shape {tuple(value.shape)}," if isinstance(value, Tensor) else ""
        raise CannotFollow(
            f"the state {key!r} of {name}{of_shape} cannot follow a parameter to the shape {now}: {why}"
        ) from None
    reason = outgrown(optimizer, change.parameter) if sizes else None
    if reason is not None:
        raise CannotFollow(f"the state of {name} is not kept for a parameter of the shape {now}: {reason}")
    return resized


@untraced
def _drop_misshapen(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # Without a new size, and without another state (loading makes a new dictionary), nothing can have
    # come to differ, and a look at every parameter in every step would cost more than the step.
    look = _looks.get(optimizer)
    if (
        look is not None
        and look.resizes == _resizes
        and look.state is optimizer.state
        and look.sizes == look.sizes_now()
    ):
        return
    look = _look(optimizer)
    look.resizes = _resizes
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    look.parameters = [parameter for parameter in held if parameter in _resized_parameters]
    look.sizes = look.sizes_now()
    entries = known(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in _resized_parameters or look.in_step(parameter):
                continue
            moved = look.moved(parameter)
            look.note(parameter)
            for key, value in optimizer.state.get(parameter, {}).items():
                entry = entries.get(key)
                if not fits(entry, value, parameter):
                    have, want = tuple(value.shape), tuple(parameter.shape)
                    why = (
                        f"has shape {have} but its parameter {want}: it changed its rank without the "
                        "optimizer. The parameter's optimizer state starts anew"
                    )
                elif moved and is_of_rows(entry, value):
                    why = (
                        "is of rows that its parameter no longer has: they went without the optimizer. The "
                        "parameter's optimizer state starts anew"
                    )
                else:
                    continue
                warn(
                    f"the state {key!r} of {type(optimizer).__name__} {why}; use "
                    "increlora_rs.attach, or make the optimizer after loading an adapter"
                )
                _forget(optimizer, parameter)
                break


def _look(optimizer: torch.optim.Optimizer) -> _Look:
    look = _looks.get(optimizer)
    if look is None or look.state is not optimizer.state:
        look = _looks[optimizer] = _Look(optimizer.state)
    return look


def _group(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    # An event asks for hundreds of parameters among thousands, so where they are is noted for all at once.
    look = _look(optimizer)
    found = _held_at(optimizer, look.places.get(id(parameter)), parameter)
    if found is None:
        look.places = {
            id(held): (index, position)
            for index, group in enumerate(optimizer.param_groups)
            for position, held in enumerate(group["params"])
        }
        found = _held_at(optimizer, look.places.get(id(parameter)), parameter)
    return {} if found is None else found


def _held_at(
    optimizer: torch.optim.Optimizer, place: tuple[int, int] | None, parameter: Tensor
) -> dict[str, Any] | None:
    """The group, if the parameter is still there: groups may have changed."""
    if place is None or place[0] >= len(optimizer.param_groups):
        return None
    group: dict[str, Any] = optimizer.param_groups[place[0]]
    held = group["params"]
    return group if place[1] < len(held) and held[place[1]] is parameter else None


def _in_groups(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[dict[Any, Any]]:
    """What the groups of an optimizer keep by parameter, as those of GrokAdamW do in the place of a state."""
    values = [value for group in optimizer.param_groups for value in group.values()]
    return [value for value in values if isinstance(value, dict) and parameter in value]


def _forget(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    for kept in _in_groups(optimizer, parameter):
        del kept[parameter]
    state, entries = optimizer.state.pop(parameter, {}), known(optimizer)
    given = {key: value for key, value in state.items() if key in entries and entries[key].kind == "given"}
    if given:
        optimizer.state[parameter] = given
