"""Who is told when rows of an adapter's parameters come and go, and what they are told."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from .modules import AdaptedModule, Rows

Cause = Literal["growth", "load", "detach"]
# A module of which rows came or went: its index, itself, its sizes before and now, and what became of them.
_Changed = tuple[int, AdaptedModule, tuple[int, ...], tuple[int, ...], Rows]


@dataclass(frozen=True, eq=False)
class Resize:
    """A parameter whose rows came or went in place; it is the same object as before.

    Rows that stay keep their order and stand at the beginning, new ones behind them. As many may have come as
    went: then the size is what it was, and the rows are not. In the capacity form sizes are the rows that
    count.

    Args:
        name: Its full name in the model given to ``attach``, as ``named_parameters()`` has it.
        parameter: The parameter, of its new size; its ``grad`` is None.
        dim: The dimension along which it changed: 0 for A (rows, in) and E (rank, 1), 1 for B (out, rows).
        old_size: Its size along ``dim`` before.
        new_size: Its size along ``dim`` now.
        kept: The old positions along ``dim`` of the rows that stayed, ascending; now they are 0, 1, 2, ...
        factor: What its old rows were multiplied by: at a change of the rank under ``scaling="rank"``, with
            ``preserve_output``, the old scale by the new one for E; else 1.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    old_size: int
    new_size: int
    kept: tuple[int, ...]
    factor: float = 1.0

    @property
    def added(self) -> range:
        """Positions along ``dim`` of the new rows, as the parameter is now."""
        return range(len(self.kept), self.new_size)

    @property
    def removed(self) -> tuple[int, ...]:
        """Positions along ``dim`` of the rows that went, as the parameter was."""
        return tuple(sorted(set(range(self.old_size)) - set(self.kept)))


@dataclass(frozen=True, eq=False)
class GrowthEvent:
    """What a callback of :meth:`increlora_rs.RankScheduler.on_growth` is given.

    Args:
        step: Optimizer steps taken.
        cause: "growth": ranks grew or fell, or components were replaced, and components in reserve may have
            been drawn or dropped with it. "load":
            an adapter or a checkpoint of other ranks was loaded into the model since the last step, so that
            no row is what it was. "detach": what was in reserve is dropped at the end; an adapter of other
            ranks may have been loaded before it (``load_best_model_at_end``).
        resizes: The parameters whose rows came or went, in model order.
    """

    step: int
    cause: Cause
    resizes: tuple[Resize, ...]
    # The tensors of averages that have followed it, by id: one that two look after follows once.
    followed: set[int] = field(default_factory=set, init=False, repr=False)


class SizeListeners:
    """The callbacks of one scheduler, and the sizes that they know of."""

    def __init__(self, model: nn.Module, modules: Sequence[AdaptedModule]) -> None:
        self._model, self._modules = model, modules
        self._callbacks: OrderedDict[int, Callable[[GrowthEvent], Any]] = OrderedDict()
        self.known = self._sizes()
        list(self._changed("load"))

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

    def tell(self, step: int, cause: Cause) -> list[AdaptedModule]:
        """Calls the callbacks if rows came or went since the last time.

        Returns:
            The modules of which any did.
        """
        changed = list(self._changed(cause))
        # A list of its own, for that of before may be in use.
        self.known = list(self.known)
        for k, _, _, now, _ in changed:
            self.known[k] = now
        if changed and self._callbacks:
            event = GrowthEvent(step, cause, tuple(self._resizes(changed, cause)))
            # A callback may remove itself.
            for callback in tuple(self._callbacks.values()):
                callback(event)
        return [module for _, module, *_ in changed]

    def _sizes(self) -> list[tuple[int, ...]]:
        """Rows of the parameters of every module."""
        return [module.sizes for module in self._modules]

    def _changed(self, cause: Cause) -> Iterator[_Changed]:
        """What became of the rows of each module of which any came or went, since the last time."""
        for k, (module, before) in enumerate(zip(self._modules, self.known, strict=True)):
            rows = module.told(before, followed=cause == "growth")
            if rows is not None:
                yield k, module, before, module.sizes, rows

    def _resizes(self, changed: list[_Changed], cause: Cause) -> list[Resize]:
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        found = []
        for _, module, before, now, rows in changed:
            rescaled = module.structure.rescaled if cause == "growth" else ()
            trained = zip(module.trained, module.dims, strict=True)
            each = zip(module.structure.names, trained, before, now, rows.kept, strict=True)
            for name, (parameter, dim), old, new, kept in each:
                if old != new or len(kept) != old:
                    factor = rows.factor if name in rescaled else 1.0
                    resize = Resize(names[id(parameter)], parameter, dim, old, new, tuple(kept), factor)
                    found.append(resize)
        return found
