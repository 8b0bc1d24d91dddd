"""In which form an adapter is trained: parameters that change their size in place, or the capacity form.

What decides works on parameters that have the rows that count, and no others. In the first form these are the
model's; in the second they are the training's own, brought in step with the model's before what decides is
called, and the model's with them after it. So whatever a policy does, it does in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..layers.factor import Factor
from ..resizing.cut import here
from ..resizing.graph import mark_growing
from ..resizing.optimizer_starts import known
from ..resizing.optimizer_state import keep_state, resize_state, start_anew, watch
from ..resizing.parameter import resize
from ..resizing.room import moved, padded
from ..support.warning import warn
from .modules import AdaptedModule
from .pieces import Pieces, Whole


class InPlace:
    """The model's parameters change their size."""

    resizes = True
    # Where the numbers of the adapter are.
    places: Whole | Pieces = Whole()

    def __init__(self, modules: Sequence[AdaptedModule], optimizer: torch.optim.Optimizer) -> None:
        self._modules, self.optimizer = modules, optimizer
        for module in modules:
            module.state = self

    def begin(self) -> None:
        """The training begins, by the sizes of now."""
        for module in self._modules:
            for name, (parameter, dim, _) in zip(module.structure.names, module.parameters, strict=True):
                if name in module.structure.growing:
                    mark_growing(parameter, dim)
                    watch(parameter)

    def settle(self) -> None:
        """A step begins: has the model hold the parameters that the optimizer trains."""

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """What decides is at work: its parameters are those of the model, before and after."""
        yield

    def in_any(self, fact: bool) -> bool:
        """Is ``fact`` true in a process that has a part of the adapter?"""
        return fact

    def trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Is a step of ``optimizer`` that begins or ends one of the adapter's parameters?"""
        return True

    def expect(self, births: Sequence[Sequence[Sequence[int]]]) -> None:
        """A state is resumed in which the parameters' rows have these births."""

    def share(self) -> None:
        """What decides was at work outside of a step: has the model compute with its values."""

    def end(self) -> None:
        """The training is over."""

    # What follows of the optimizer's state.

    def start_anew(self, parameter: nn.Parameter, counted: int | None = None) -> None:
        """As :func:`increlora_rs.resizing.optimizer_state.start_anew`."""
        start_anew(self.optimizer, parameter, counted)

    def resize_state(
        self, parameter: nn.Parameter, dim: int, rescaled: float, kept: Sequence[int] | None
    ) -> None:
        """As :func:`increlora_rs.resizing.optimizer_state.resize_state`."""
        resize_state(self.optimizer, parameter, dim, rescaled, kept)

    def keep_state(self, parameter: nn.Parameter) -> None:
        """As :func:`increlora_rs.resizing.optimizer_state.keep_state`."""
        keep_state(self.optimizer, parameter)


class InRoom(InPlace):
    """The capacity form: the model's parameters keep their size, and the first rows of them count.

    Args:
        modules: The adapted modules.
        optimizer: The torch optimizer.
        places: Where their numbers are: whole in this process, or a piece.

    Raises:
        ValueError: the optimizer moves further weights along with the parameters (schedule-free).
    """

    resizes = False

    def __init__(
        self, modules: Sequence[AdaptedModule], optimizer: torch.optim.Optimizer, places: Whole | Pieces
    ) -> None:
        if any(entry.is_weights for entry in known(optimizer).values()):
            raise ValueError(
                f"optimizer: a {type(optimizer).__name__} keeps weights of its own beside the parameters, "
                "which cannot follow ranks in the capacity form; use AdamW, or growth='resize'."
            )
        super().__init__(modules, places.seen(optimizer))
        self.places = places
        self._probe = modules[0].layer.probes[modules[0].adapter]
        self._factors: list[Factor] = [
            factor for module in modules for factor in module.layer.held_factors(module.adapter)
        ]
        self._depth = 0
        for factor in self._factors:
            factor.begin_work(places.dtype, places.device)
        self._of = {id(factor.work): factor for factor in self._factors}
        # Rows of the state that are to move when all are gathered.
        self._moves: list[tuple[Factor, list[int]]] = []

    def begin(self) -> None:
        """Nothing changes its size."""

    def settle(self) -> None:
        """A step begins: has the model hold the parameters that the optimizer trains."""
        self.places.settle()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """What decides is at work, on parameters of the rows that count."""
        self._depth += 1
        if self._depth == 1:
            self._take()
            self._probe.at_work = True
        try:
            yield
            if self._depth == 1:
                self._give()
        finally:
            self._depth -= 1
            self._probe.at_work = self._depth > 0

    def in_any(self, fact: bool) -> bool:
        """Is ``fact`` true in a process that has a part of the adapter?"""
        return self.places.in_any(fact)

    def trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Is a step of ``optimizer`` that begins or ends one of the adapter's parameters?"""
        return self.places.trained_by(optimizer)

    def expect(self, births: Sequence[Sequence[Sequence[int]]]) -> None:
        """A state is resumed: where it holds the values, the rows that count are its own."""
        if self.places.values_in_state:
            of_all = [steps for of_module in births for steps in of_module]
            for factor, steps in zip(self._factors, of_all, strict=True):
                factor.take_rows(factor.dim, len(steps))

    def share(self) -> None:
        """What decides was at work outside of a step: has the model compute with its values."""
        self.places.share()

    def end(self) -> None:
        """The training is over: the rows that count are read off the model's parameters again."""
        for factor in self._factors:
            factor.end_work()

    @torch.no_grad()
    def _take(self) -> None:
        """Values and gradients from the model's parameters."""
        self.settle()
        weights = [factor.weight for factor in self._factors]
        values = self.places.gathered(weights, list(map(self.places.value, weights)))
        gradients = self.places.gathered(weights, list(map(self.places.gradient, weights)))
        for factor, value, gradient in zip(self._factors, values, gradients, strict=True):
            work = _work(factor)
            assert value is not None
            counted = _counted(factor, value)
            if work.shape != counted.shape:
                resize(work, counted.clone(memory_format=torch.contiguous_format))
            else:
                work.copy_(counted)
            if gradient is None:
                work.grad = None
            elif work.grad is None:
                work.grad = _counted(factor, gradient).to(work.dtype, copy=True).contiguous()
            else:
                work.grad.copy_(_counted(factor, gradient))

    @torch.no_grad()
    def _give(self) -> None:
        """Values and gradients to the model's parameters."""
        self._move_states()
        for factor in self._factors:
            work, weight, before = _work(factor), factor.weight, factor.rows
            if factor.room is not None and work.shape[factor.dim] != before:
                factor.take_rows(factor.dim, int(work.shape[factor.dim]))
            rows = max(before, factor.rows)
            self.places.put(factor, self.places.value(weight), work.detach(), rows)
            gradient = self.places.gradient(weight)
            if work.grad is None:
                weight.grad = None
            elif gradient is not None:
                self.places.put(factor, gradient, work.grad, factor.rows)
            elif not self.places.is_sharded:
                weight.grad = _padded(factor, work.grad)

    # What follows of the optimizer's state, which is of the model's parameters.

    def start_anew(self, parameter: nn.Parameter, counted: int | None = None) -> None:
        """Of the model's parameter."""
        self.places.start_anew(self.optimizer, self._of[id(parameter)].weight, counted)

    def resize_state(
        self, parameter: nn.Parameter, dim: int, rescaled: float, kept: Sequence[int] | None
    ) -> None:
        """Rows that stay move to the front; where none went, those that came have had no gradient."""
        factor, now = self._of[id(parameter)], int(parameter.shape[dim])
        if kept is not None or now < factor.rows:
            self._moves.append((factor, list(range(now) if kept is None else kept)))

    def keep_state(self, parameter: nn.Parameter) -> None:
        """It is as it was."""

    def _move_states(self) -> None:
        moves, self._moves = self._moves, []
        if not moves:
            return
        weights = [factor.weight for factor, _ in moves]
        pieces = list(map(self.places.value, weights))
        states = [_state_here(self.optimizer, weight) for weight in weights]
        of_rows = {
            key
            for state, piece in zip(states, pieces, strict=True)
            for key, value in state.items()
            if _of_rows(value, piece) is not None
        }
        for key in self.places.all_of(of_rows):
            values = [_of_rows(state.get(key), piece) for state, piece in zip(states, pieces, strict=True)]
            wholes = self.places.gathered(weights, values)
            for (factor, kept), value, whole in zip(moves, values, wholes, strict=True):
                if whole is not None and value is not None:
                    rows = moved(whole, factor.dim, kept)
                    self.places.put(factor, value, rows, rows.shape[factor.dim])
        for weight, piece, state in zip(weights, pieces, states, strict=True):
            if any(_is_other(value, piece) for value in state.values()):
                warn(
                    f"the state of {type(self.optimizer).__name__} has not a number for each of the "
                    "parameter's, and cannot follow components that move. The parameter's optimizer state "
                    "starts anew; docs/optimizers.md names optimizers that keep theirs"
                )
                self.places.start_anew(self.optimizer, weight, None)


def _work(factor: Factor) -> nn.Parameter:
    assert factor.work is not None
    return factor.work


def _counted(factor: Factor, value: Tensor) -> Tensor:
    return value if factor.room is None else value.narrow(factor.dim, 0, factor.rows)


def _padded(factor: Factor, rows: Tensor) -> Tensor:
    return rows.clone() if factor.room is None else padded(rows, factor.dim, factor.room[factor.dim])


def _state_here(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> dict[str, object]:
    """This process's piece of the state of a parameter."""
    state: dict[str, object] = optimizer.state.get(weight, {})
    return {key: here(value) for key, value in state.items()}


def _of_rows(value: object, piece: Tensor) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.shape == piece.shape and value.dim() else None


def _is_other(value: object, piece: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape != piece.shape
