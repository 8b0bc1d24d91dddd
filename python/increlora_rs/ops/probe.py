"""What the layers of one adapter share with the training: what its backward passes are asked for."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ..gauges import Gauge
from ..support.history import GrowthHistory
from ..support.warning import warn

# Backward passes after which a missing scheduler is noticed, and an optimizer that takes no step.
_UNATTENDED_PASSES = 50
_IDLE_PASSES = 1000


# Of a graph: the collector, the switch, what is given and the name of a gauge; see ops/graph.py.
Asked = tuple[Tensor | None, Tensor | None, list[Tensor], str]


@dataclass(eq=False)
class Probe:
    """What the layers of one adapter share with their scheduler.

    Args:
        title: Name of the adapter's method.
        expected: Does the method need a scheduler?
        gauge: What the backward passes can be asked for, if anything.
        armed: Are the next ones asked for it?
        switch: ``armed`` for compiled graphs, which read it when they run: a bool scalar on the CPU.
        attached: Is there a scheduler?
        unattended: Backward passes since the scheduler's optimizer took a step, or ever without one.
        layers: Number of layers that share the probe.
        at_work: Of the capacity form: is what decides at work, on parameters of its own?
        reloaded: Did a layer take another rank from a checkpoint since the scheduler looked?
        history: How the ranks of the adapter grew; it stays when the training is over.
        copies: The probes of the copies of the model that were made so far, of copies of copies too.
    """

    title: str = "IncreLoRA"
    expected: bool = True
    gauge: Gauge | None = None
    armed: bool = False
    switch: Tensor | None = None
    attached: bool = False
    unattended: int = 0
    layers: int = 0
    at_work: bool = False
    reloaded: bool = False
    history: GrowthHistory | None = None
    copies: list[ReferenceType[Probe]] = field(default_factory=list, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has no scheduler.
        of_scheduler = {"gauge": None, "armed": False, "switch": None, "attached": False, "at_work": False}
        return self.__dict__ | of_scheduler | {"copies": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> Probe:
        made = Probe(**copy.deepcopy(self.__getstate__(), memo))
        self.copies[:] = [known for known in self.copies if known() is not None]
        made.copies = self.copies
        made.copies.append(ref(made))
        return made

    def attach(self, gauge: Gauge | None) -> None:
        """Takes a scheduler, and what it will ask for."""
        self.attached, self.gauge = True, gauge
        self.switch = torch.zeros((), dtype=torch.bool, device="cpu")

    def arm(self, wanted: bool) -> None:
        """Asks the next backward passes to add to the gauge, or no longer."""
        self.armed = wanted and self.gauge is not None
        if self.switch is not None:
            self.switch.fill_(self.armed)

    def detach(self) -> None:
        """Lets the scheduler go."""
        self.attached = self.armed = False
        self.gauge = self.switch = None

    def new_slot(self) -> int:
        """Slot of one more layer."""
        self.layers += 1
        return self.layers - 1

    def count_backward(self, slot: int) -> None:
        """Notices a training without a scheduler, or with another optimizer than its; one warning."""
        if slot != 0 or not self.expected:
            return
        self.unattended += 1
        if self.attached and self.unattended == _IDLE_PASSES:
            warn(
                f"{_IDLE_PASSES} backward passes through an adapter of {self.title}, but the optimizer that "
                "its scheduler is attached to took no step, so it changes nothing. If the optimizer was made "
                "anew, call detach() and increlora_rs.attach(model, new_optimizer, ...)."
            )
        elif not self.attached and self.unattended == _UNATTENDED_PASSES:
            warn(
                f"{_UNATTENDED_PASSES} backward passes through an adapter of {self.title} and no scheduler "
                "attached: what the method does beside the optimizer (ranks that change, pruning, merging) "
                "is not done. Give Trainer callbacks=[increlora_rs.IncreLoraCallback()], or call "
                "increlora_rs.attach(model, optimizer, total_steps=...) before training."
            )


def for_graph(probe: Probe | None, slot: int) -> Asked:
    """The module's part of the probe, for a compiled graph."""
    # Without gradients nobody asks, and the graph need not know whether there is a scheduler.
    if probe is None or not torch.is_grad_enabled() or probe.gauge is None:
        return None, None, [], ""
    gauge = probe.gauge
    return gauge.collector(slot), probe.switch, gauge.given(slot), gauge.name
