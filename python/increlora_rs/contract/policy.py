"""What a method changes while it trains. One object a training; :func:`increlora_rs.attach` makes it, and the
training calls it at every optimizer step.

A policy knows parameters and numbers, and nothing else: hooks, closures, accumulation, loss scalers, several
processes, checkpoint files, the optimizer's state and DDP's buckets after a change of sizes are the
training's (``training/``). So a method is written as if there were one process and a plain loop:

    backward passes            they add to ``gauge``, if ``wants`` said so
    before_step(step)          gradients are final: accumulated, averaged, clipped
    optimizer.step()
    after_step(step)           parameters have moved; the gradients are still there
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..gauges import Gauge
from ..support.seeded import generator

LrSchedule = Literal["auto", "linear", "follow"]


class AdaptedModule(Protocol):
    """What a policy knows of an adapted module.

    Attributes:
        name: Full module name.
        layer: The adapted layer; its ``site``, ``configs``, ``scaling``.
        adapter: Name of the adapter.
        births: Of each parameter the steps at which its rows were born.
    """

    name: str
    layer: Any
    adapter: str
    births: list[list[int]]

    @property
    def structure(self) -> Any:
        """The method's structure, which may have ways of its own to change the parameters."""

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        """The parameters, in the order of ``structure.names``."""

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """Those that the optimizer holds: ``factors``, or in the capacity form larger ones, whose rows that
        count these are."""

    @property
    def parameters(self) -> list[tuple[nn.Parameter, int, list[int]]]:
        """Each parameter, the dimension of its rows, and the steps at which these were born."""

    @property
    def rank(self) -> int:
        """The rank, as the parameters' sizes tell it."""

    @property
    def rows(self) -> int:
        """Components, those in reserve included."""

    def first_learners(self) -> list[nn.Parameter]:
        """The parameters that are the first to get a gradient; none where all are."""

    def grow(
        self, components: int, generator: torch.Generator, directions: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Makes more components active, where the structure can grow."""

    def shrink(self, keep: Sequence[int]) -> None:
        """Keeps of the active components those at the positions ``keep``, ascending, where the structure can
        shrink. New ones, by :meth:`grow` in the same event, stand behind them: so components are moved from
        module to module, or replaced."""

    def set_reserve(self, components: int, generator: torch.Generator | None = None) -> None:
        """Draws, or drops, components in reserve."""


@dataclass(frozen=True)
class Plan:
    """What is known of a training before its first step.

    Args:
        seed: Of all that is drawn; the same in every process.
        total_steps: Optimizer steps of the training; None: not known.
        lr_warmup_steps: Steps of the learning rate's linear warm-up.
        lr_schedule: What the learning rate does after it; see :func:`increlora_rs.attach`.
        optimizer: The torch optimizer that holds the parameters; its groups have the learning rates of now.
        device: Where the parameters of the first module are.
    """

    seed: int
    total_steps: int | None
    lr_warmup_steps: int
    lr_schedule: LrSchedule
    optimizer: torch.optim.Optimizer
    device: torch.device


class Step(NamedTuple):
    """The optimizer step at hand.

    Args:
        number: Its number, from 1 on.
        armed: Did the backward passes since the last step add to the gauge?
        lead: Steps that the optimizer's state counts beyond ours: those before ``attach``.
        skipped: Calls of the optimizer so far that did nothing, for gradients overflowed; schedules of the
            learning rate may have counted them.
        grad_scale: What gradients, and the gauge, are multiplied by, where a fused optimizer divides by it in
            its own step, a tensor of one number; None: gradients are as they are. A gradient that is added to
            them has to be multiplied by it, too.
        found_inf: Where a fused optimizer is given it: a tensor of one number, above 0 where gradients
            overflowed, so that the step will do nothing. Reading it waits for the device.
    """

    number: int
    armed: bool = False
    lead: int = 0
    skipped: int = 0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    ask_loss_scale: Callable[[], float | None] | None = None

    @property
    def loss_scale(self) -> float | None:
        """What the loss, and so the gauge, was multiplied by where the gradients no longer are; None: by
        nothing. It may wait for the device."""
        if self.grad_scale is not None or self.ask_loss_scale is None:
            return None
        return self.ask_loss_scale()


@dataclass(frozen=True)
class Event:
    """What a policy changed after a step, for all who have to follow; it goes into the history.

    Args:
        changed: Indices of the modules whose rank changed, in the order of ``history``.
        scores: What it was decided by, a value a module.
        line: For the log.
        resized: Did rows of parameters come or go (``AdaptedModule.grow``, ``shrink``, ``set_reserve``), also
            where as many came as went? Then births,
            optimizer state, DDP's buckets and ``rank_pattern`` follow, listeners are told, and
            :meth:`Policy.resized` is called.
        restarted: Parameters whose values were replaced, so that their optimizer state has to begin anew.
        warning: Told when all have followed.
    """

    changed: Sequence[int]
    scores: npt.NDArray[np.float64]
    line: str
    resized: bool = True
    restarted: tuple[nn.Parameter, ...] = ()
    warning: str | None = None


class Policy:
    """What changes while a method trains; as it is, nothing does.

    A subclass takes of the methods below what it needs. All are called in every process alike, and have to do
    the same there: what differs between processes goes through the gauge, which is averaged, or through
    ``training.distributed``; random numbers come from :meth:`generator`. Those of a step are called under
    ``torch.no_grad``.

    Args:
        modules: The adapted modules, in model order.
        config: The adapter's configuration.
        plan: What is known of the training. A resumed one has the seed of the run that it goes on with.
    """

    # What the backward passes add up for it. The training averages its total over processes before
    # before_step, drops what a skipped step left, and keeps it in checkpoints. The policy takes it in in
    # before_step, where `step.armed`, and leaves it at 0.
    gauge: Gauge | None = None
    # What the ranks may take in all, and a component of each module of it; None: there is no budget; 1 each.
    budget: int | None = None
    costs: list[int] | None = None
    # Is an average of the parameters over steps (EMA, SWA) one of updates? Not where they begin anew.
    averages: bool = True

    def __init__(self, modules: Sequence[AdaptedModule], config: Any, plan: Plan) -> None:
        self.modules, self.config, self.plan = modules, config, plan

    def start(self) -> None:
        """Before the first step of a training, and never in one that is resumed."""

    def wants(self, number: int) -> bool:
        """Are the backward passes before step ``number`` to add to the gauge? Asked once a step."""
        return self.gauge is not None

    def decides(self, number: int) -> bool:
        """May ranks change after step ``number``? Before it the training makes sure that all processes have
        the same adapter and the same gradients to decide by."""
        return False

    def before_step(self, step: Step) -> None:
        """Between the backward pass and the optimizer's update, for what changes gradients: a regulariser, an
        L1 term; and to keep what :meth:`after_step` will need of the parameters as they were.

        It may be called for a step that then does nothing (``step.found_inf``), and by a closure several
        times for one: what else has a state changes in :meth:`after_step`.
        """

    def after_step(self, step: Step) -> Event | None:
        """After an update that counts, for what changes parameters: grow, mask, shrink, prune, merge.
        ``p.grad`` is what the update used. None: no rank and no size changed."""
        return None

    def resized(self) -> None:
        """Sizes changed, by an event or because an adapter of other ranks was loaded, and births and
        optimizer state have followed."""

    def ranks(self) -> list[int]:
        """The rank of every module that counts: of its components those that act."""
        return [module.rank for module in self.modules]

    def scores(self) -> npt.NDArray[np.float64]:
        """What the next decision would be made by, or the last one was: a value a module."""
        return np.zeros(len(self.modules))

    def scalars(self) -> dict[str, float]:
        """Numbers of single modules for charts, as "KIND/NAME"; the method's name is put before them."""
        values = {"rank": self.ranks(), "score": self.scores().tolist()}
        return {
            f"{kind}/{module.name}": value
            for kind, of_all in values.items()
            for module, value in zip(self.modules, of_all, strict=True)
        }

    def logs(self) -> dict[str, float]:
        """Numbers for the log of a training step, beside its ``total_rank``."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs beside parameters, births and the gauge: numbers, strings, lists,
        dictionaries with string keys, and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave, in the place of :meth:`start` or later. What was planned
        otherwise than by the training at hand is told, and kept."""

    def finish(self) -> None:
        """The training is over: drops what was for it alone, such as components in reserve."""

    def generator(self, number: int, module: int, purpose: str) -> torch.Generator:
        """Random numbers for a module (its index) at a step: the same in every process and after a resume."""
        return generator(self.plan.seed, number, module, purpose)
