"""Notices averages of the weights that did not follow a growth, and tells the way out before they fail."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Any
from weakref import ReferenceType, WeakSet

from torch import nn

from ..ops.probe import Probe
from ..support.warning import warn
from .held import Held, HeldLayer, HeldTensor, held_by
from .modules import AdaptedModule

# Classes that average weights, by the module that they are in. One that is not loaded has no instances.
_AVERAGES = {
    "torch.optim.swa_utils": ("AveragedModel",),
    "diffusers.training_utils": ("EMAModel",),
    "pytorch_lightning.callbacks": ("StochasticWeightAveraging",),
    "lightning.pytorch.callbacks": ("StochasticWeightAveraging",),
    "timm.utils": ("ModelEma", "ModelEmaV2", "ModelEmaV3"),
    "ema_pytorch": ("EMA",),
    "torch_ema": ("ExponentialMovingAverage",),
}
# Those of them that hold tensors, of which it cannot be seen what they are copies of.
_OF_TENSORS = ("diffusers.training_utils", "torch_ema")

# What some scheduler's averages are kept by, or were: layers of copies, and objects that hold tensors.
_known: WeakSet[Any] = WeakSet()

_GROWN = (
    "averages this adapter but did not grow with it: its next update will fail, broadcast rows, or average "
    "different components. Call increlora_rs.keep_average(scheduler, average) after attach, or use "
    "IncreLoraCallback(averages=[average])"
)
BEGUN_ANEW = (
    "averages this adapter, whose parameters have begun anew: what it has is the average of no update. Drop "
    "it, or train without what lets them begin anew (MoRA: remora_interval)"
)


def note(average: Any, held: Sequence[Held]) -> None:
    """Notes that somebody looks after ``average``, of which ``held`` are the parts."""
    layers = [part.copy.layer for part in held if isinstance(part, HeldLayer)]
    _known.update(layers)
    # Lists and dictionaries cannot be noted, and are not looked for.
    if not layers and type(average).__weakrefoffset__ and type(average).__hash__ is not None:
        _known.add(average)


class Bystanders:
    """The averages that know nothing of one scheduler's growths; each is told of once.

    Args:
        model: The model whose adapter grows.
        modules: Its modules.
        in_pieces: Has this process but a piece of them? Then an average is not seen to lag.
    """

    def __init__(self, model: nn.Module, modules: Sequence[AdaptedModule], in_pieces: bool = False) -> None:
        self._model, self._modules, self._in_pieces = model, modules, in_pieces
        self._seen: list[ReferenceType[Probe]] = []
        self._looked = False
        self._told: set[int] = set()

    def warn(
        self,
        step: int,
        before: Sequence[tuple[int, ...]],
        changed: Sequence[AdaptedModule],
        told: str = _GROWN,
    ) -> None:
        """After a growth and all who were told of it, tells ``told`` of each average that it finds.
        ``before``: rows of the modules' parameters before it; ``changed``: the modules of which any came or
        went."""
        if self._in_pieces:
            return
        # The look at all objects takes longer than a growth: only where there is something new to find.
        first, self._looked = not self._looked, True
        tensors = first and any(name in sys.modules for name in _OF_TENSORS)
        if not (self._new_copies() or tensors):
            return
        now, of_changed = [module.sizes for module in self._modules], set(map(id, changed))
        # An average of these has the right sizes, whether it followed or not.
        moved = {
            id(module)
            for module, old, new in zip(self._modules, before, now, strict=True)
            if old == new and id(module) in of_changed
        }
        for average in _living():
            if id(average) not in self._told and self._lags(average, before, moved):
                self._told.add(id(average))
                warn(f"step {step}: {type(average).__name__} {told}")

    def _new_copies(self) -> bool:
        """Was a copy of the model made since the last look that still lives?"""
        known = {id(copied) for copied in self._seen}
        self._seen = [copied for copied in self._probe().copies if copied() is not None]
        return any(id(copied) not in known for copied in self._seen)

    def _probe(self) -> Probe:
        first = self._modules[0]
        return first.layer.probes[first.adapter]

    def _lags(self, average: Any, before: Sequence[tuple[int, ...]], moved: set[int]) -> bool:
        """Is ``average`` one of this adapter, and of other sizes than it has now, or of modules ``moved``?"""
        try:
            held = held_by(average, self._model, self._modules)
        except (ValueError, TypeError):
            return False
        if not any(part.out_of_step() or id(part.module) in moved for part in held):
            return False
        copies = [part.copy for part in held if isinstance(part, HeldLayer)]
        if copies:
            ours = {id(copied()) for copied in self._seen}
            made_of_it = any(id(copied.layer.probes[copied.adapter]) in ours for copied in copies)
            return made_of_it and not any(copied.layer in _known for copied in copies)
        if average in _known:
            return False
        # Another training's average of a like model has its sizes at most by chance.
        sizes = {id(module): size for module, size in zip(self._modules, before, strict=True)}
        return all(
            part.has(sizes[id(part.module)][part.factor]) for part in held if isinstance(part, HeldTensor)
        )


def _living() -> list[Any]:
    """All objects of a class that averages weights."""
    classes = tuple(
        found
        for module, names in _AVERAGES.items()
        if module in sys.modules
        for name in names
        if isinstance(found := getattr(sys.modules[module], name, None), type)
    )
    objects = gc.get_objects()
    # By type: asking some of torch's own objects for their class warns. And each type once: there are
    # many objects, and few types.
    wanted = {kind for kind in set(map(type, objects)) if issubclass(kind, classes)}
    return [candidate for candidate in objects if type(candidate) in wanted] if wanted else []
