"""Who is told when parameters of an adapter change their size, and what they are told."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from .modules import AdaptedModule

Cause = Literal["growth", "load", "detach"]


@dataclass(frozen=True, eq=False)
class Resize:
    """A parameter that changed its size in place; it is the same object as before.

    Rows come and go at the end: those that stay keep their places.

    Args:
        name: Its full name in the model given to ``attach``, as ``named_parameters()`` has it.
        parameter: The parameter, of its new size; its ``grad`` is None.
        dim: The dimension along which it changed: 0 for A (rows, in) and E (rank, 1), 1 for B (out, rows).
        old_size: Its size along ``dim`` before.
        new_size: Its size along ``dim`` now.
        factor: What its old rows were multiplied by: at a growth under ``scaling="rank"``, with
            ``preserve_output``, the old scale by the new one for E; else 1.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    old_size: int
    new_size: int
    factor: float = 1.0

    @property
    def added(self) -> range:
        """Positions of the new rows along ``dim``."""
        return range(self.old_size, self.new_size)

    @property
    def removed(self) -> range:
        """Positions along ``dim`` of the rows that were cut off."""
        return range(self.new_size, self.old_size)


@dataclass(frozen=True, eq=False)
class GrowthEvent:
    """What a callback of :meth:`increlora_rs.RankScheduler.on_growth` is given.

    Args:
        step: Optimizer steps taken.
        cause: "growth": ranks grew, and components in reserve may have been drawn or dropped with it. "load":
            an adapter or a checkpoint of other ranks was loaded into the model since the last step, so that
            no row is what it was. "detach": what was in reserve is dropped at the end; an adapter of other
            ranks may have been loaded before it (``load_best_model_at_end``).
        resizes: The parameters that changed their size, in model order.
    """

    step: int
    cause: Cause
    resizes: tuple[Resize, ...]


class SizeListeners:
    """The callbacks of one scheduler, and the sizes that they know of."""

    def __init__(self, model: nn.Module, modules: Sequence[AdaptedModule]) -> None:
        self._model, self._modules = model, modules
        self._callbacks: OrderedDict[int, Callable[[GrowthEvent], Any]] = OrderedDict()
        self.known = self._sizes()

    def add(self, callback: Callable[[GrowthEvent], Any]) -> RemovableHandle:
        """Has ``callback`` called from now on.

        Raises:
            TypeError: it cannot be called.
        """
        if not callable(callback):
            raise TypeError(
                f"callback={callback!r} cannot be called; give a function that takes a GrowthEvent."
            )
        handle = RemovableHandle(self._callbacks)
        self._callbacks[handle.id] = callback
        return handle

    def tell(self, step: int, cause: Cause) -> bool:
        """Calls the callbacks if a size changed since the last time. Did one?"""
        before, now = self.known, self._sizes()
        self.known = now
        if before == now:
            return False
        if self._callbacks:
            event = GrowthEvent(step, cause, tuple(self._resizes(before, now, cause)))
            # A callback may remove itself.
            for callback in tuple(self._callbacks.values()):
                callback(event)
        return True

    def _sizes(self) -> list[tuple[int, ...]]:
        """Rows of the parameters of every module."""
        return [module.sizes for module in self._modules]

    def _resizes(
        self, before: list[tuple[int, ...]], now: list[tuple[int, ...]], cause: Cause
    ) -> list[Resize]:
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        found = []
        for module, *sizes in zip(self._modules, before, now, strict=True):
            rescaled = module.structure.rescaled if cause == "growth" else ()
            each = zip(module.structure.names, module.parameters, *sizes, strict=True)
            for name, (parameter, dim, _), old, new in each:
                if old != new:
                    factor = module.rescaled_by_growth(old, new) if name in rescaled else 1.0
                    found.append(Resize(names[id(parameter)], parameter, dim, old, new, factor))
        return found
