"""What happens to an optimizer, told to one training: its steps, however they are called, and its state's
saving and loading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..support.untraced import untraced
from .nested_step import StepDepth


class Training(Protocol):
    """What is told."""

    def begin_step(self) -> None:
        """The optimizer's ``step`` was called."""

    def take_gradients(self) -> None:
        """Between the backward pass and the update; by a closure maybe several times in a step."""

    def check_loaded(self) -> None:
        """Before a closure's backward pass."""

    def end_step(self) -> None:
        """The optimizer's ``step`` is over."""

    def save(self, state_dict: dict[str, Any]) -> None:
        """The optimizer's state is being saved, as ``state_dict``."""

    def after_load(self) -> None:
        """The optimizer has loaded a state."""

    def take_state(self) -> None:
        """It may have, without calling its hooks."""

    def trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Is the step of it that begins or ends one of the adapter?"""


class Hooks:
    """The hooks of one training on its optimizer.

    Args:
        optimizer: The torch optimizer whose ``step`` moves the parameters.
        session: The training.
        around: What loads the optimizer's state, and values that it holds, in its own ``load_state_dict``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, session: Training, around: Any = None) -> None:
        self._loads, self._session = optimizer if around is None else around, session
        self._depth = StepDepth()
        self._watched: Callable[..., Any] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
        ]
        if around is None:
            self._handles.append(optimizer.register_load_state_dict_post_hook(self._after_load))
        self._watch_loading()

    def remove(self) -> None:
        """Takes them off; the optimizer is as it was."""
        for handle in self._handles:
            handle.remove()
        if self._watched is not None and vars(self._loads).get("load_state_dict") is self._watched:
            del self._loads.load_state_dict

    def _watch_loading(self) -> None:
        """Has a state taken in that the optimizer loads without calling hooks, as bitsandbytes' do."""
        load = self._loads.load_state_dict
        if type(self._loads).load_state_dict is torch.optim.Optimizer.load_state_dict:
            return

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = load(*args, **kwargs)
            self._session.take_state()
            return result

        self._watched = watched
        vars(self._loads)["load_state_dict"] = watched

    @untraced
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._session.trained_by(optimizer) or not self._depth.enters(optimizer):
            return None
        self._session.begin_step()
        # args[0] is the optimizer.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._session.take_gradients()
            return None
        self._session.check_loaded()

        @untraced
        def take_gradients() -> None:
            self._session.take_gradients()

        def then_take_gradients() -> Any:
            loss = closure()
            take_gradients()
            return loss

        return (args[0], then_take_gradients, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    @untraced
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._session.trained_by(optimizer) and self._depth.leaves():
            self._session.end_step()

    @untraced
    def _save(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        self._session.save(state_dict)

    @untraced
    def _after_load(self, *_: Any) -> None:
        self._session.after_load()


def hooked(optimizer: torch.optim.Optimizer) -> bool:
    """Has a training hooks on ``optimizer`` already?"""
    hooks = optimizer._optimizer_step_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), Hooks) for hook in hooks)
