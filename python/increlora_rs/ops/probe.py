"""What the layers of one adapter share with the training: what its backward passes are asked for."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ..gauges.sketch import Sketch
from ..support.history import GrowthHistory

# Backward passes after which a missing scheduler is noticed, and an optimizer that takes no step.
_UNATTENDED_PASSES = 50


_IDLE_PASSES = 1000


@dataclass
class Probe:
    """What the layers of one adapter share with their scheduler.

    Args:
        importance: float64 vector with a slot a module, to which every backward pass adds; None while
            the importance is not asked for.
        collector: What a compiled graph knows of it: a leaf of which it is the gradient, None without a
            scheduler. armed: is the importance asked for? A bool scalar on the CPU.
        scheduler: What makes the ranks grow, if anything does.
        unattended: Backward passes since the scheduler's optimizer took a step, or ever without one.
        layers: Number of layers that share the probe.
        reloaded: Did a layer take another rank from a checkpoint since the scheduler looked?
        sketches: With ``importance="gradient"`` the sketch of each module's gradient, else None.
        sketching: Are the backward passes to add to them?
        history: How the ranks of the adapter grew; it stays when the training is over.
        copies: The probes of the copies of the model that were made so far, of copies of copies too.
    """

    importance: Tensor | None = None
    collector: Tensor | None = None
    armed: Tensor | None = None
    scheduler: Any = None
    unattended: int = 0
    layers: int = 0
    reloaded: bool = False
    sketches: list[Sketch] | None = None
    sketching: bool = False
    history: GrowthHistory | None = None
    copies: list[ReferenceType[Probe]] = field(default_factory=list, repr=False, compare=False)

    @property
    def attached(self) -> bool:
        """Is there a scheduler?"""
        return self.scheduler is not None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has no scheduler.
        own = ("scheduler", "importance", "collector", "armed")
        rest: dict[str, Any] = {"sketches": None, "sketching": False, "copies": []}
        return self.__dict__ | dict.fromkeys(own) | rest

    def __deepcopy__(self, memo: dict[int, Any]) -> Probe:
        made = Probe(**copy.deepcopy(self.__getstate__(), memo))
        self.copies[:] = [known for known in self.copies if known() is not None]
        made.copies = self.copies
        made.copies.append(ref(made))
        return made

    def attach(self, scheduler: Any, importance: Tensor) -> None:
        """Takes a scheduler, and the vector that it will ask for."""
        self.scheduler = scheduler
        self.collector = torch.zeros_like(importance, requires_grad=True)
        # Autograd adds to the gradient in place.
        self.collector.grad = importance
        self.armed = torch.zeros((), dtype=torch.bool, device="cpu")

    def arm(self, importance: Tensor | None, *, sketching: bool = False) -> None:
        """Asks the next backward passes for the importance or the sketches, or no longer."""
        self.importance, self.sketching = importance, sketching
        if self.armed is not None:
            self.armed.fill_(importance is not None or sketching)

    def sketch(self, slot: int) -> Sketch | None:
        """The module's sketch, if the backward pass at hand is to add to it."""
        return self.sketches[slot] if self.sketching and self.sketches is not None else None

    def detach(self) -> None:
        """Lets the scheduler go."""
        self.scheduler = self.importance = self.collector = self.armed = self.sketches = None
        self.sketching = False

    def new_slot(self) -> int:
        """Slot of one more layer."""
        self.layers += 1
        return self.layers - 1

    def count_backward(self, slot: int) -> None:
        """Notices a training without a scheduler, or with another optimizer than its; one warning."""
        if slot != 0:
            return
        self.unattended += 1
        if self.attached and self.unattended == _IDLE_PASSES:
            warnings.warn(
                f"{_IDLE_PASSES} backward passes through an IncreLoRA adapter, but the optimizer that its "
                "scheduler is attached to took no step: its ranks stay as they are. If the optimizer was "
                "made anew, call detach() and increlora_rs.attach(model, new_optimizer, ...).",
                UserWarning,
                stacklevel=2,
            )
        elif not self.attached and self.unattended == _UNATTENDED_PASSES:
            warnings.warn(
                f"{_UNATTENDED_PASSES} backward passes through an IncreLoRA adapter and no scheduler "
                "attached: its ranks stay as they are. Give Trainer "
                "callbacks=[increlora_rs.IncreLoraCallback()], or call "
                "increlora_rs.attach(model, optimizer, total_steps=...) before training.",
                UserWarning,
                stacklevel=2,
            )


def asked_of(probe: Probe | None, slot: int) -> dict[str, Tensor | None]:
    """The module's part of the probe, for a compiled graph."""
    # Without gradients nobody asks, and the graph need not know whether there is a scheduler.
    if probe is None or not torch.is_grad_enabled() or probe.collector is None:
        return dict.fromkeys(("collector", "armed", "omega", "psi"))
    asked = {"collector": probe.collector.narrow(0, slot, 1), "armed": probe.armed}
    if probe.sketches is None:
        return asked | {"omega": None, "psi": None}
    sketch = probe.sketches[slot]
    return asked | {"collector": sketch.collector, "omega": sketch.omega, "psi": sketch.psi}
