"""Averages of the weights (EMA, SWA) that others hold follow when ranks change."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..support.warning import warn
from .bystanders import note
from .events import GrowthEvent
from .held import Held, parts_of
from .held_pieces import held_whole
from .scheduler import RankScheduler


def keep_average(
    scheduler: RankScheduler,
    average: Any,
    *,
    parameters: Iterable[nn.Parameter] | None = None,
) -> RemovableHandle:
    """Has an average of the weights (EMA, SWA) grow with the ranks.

    Call it once, after ``attach``; the average may have been made before. It takes the size of the adapter
    at once, and again after each growth, in place: its tensors stay the objects that they are. A new row
    starts as the adapter's own, as a fresh average does, so that a growth does to the average's output what
    it does to the adapter's: nothing, unless the configuration has it otherwise. A row that is older than
    what the average has seen enters with B = 0. Under ``scaling="rank"`` the old rows of E are rescaled as
    the adapter's are. In the capacity form an average of the parameters has their size, and 0 where they
    have it; where each process has a piece of the adapter (FSDP1 and FSDP2), so it has of the average, and
    all processes call this.

    If an adapter of other ranks is loaded during the training and the average of the same checkpoint is not,
    the averages of modules of other ranks start anew, with a warning. ``scheduler.detach()`` drops what the
    average has in reserve, too.

    Args:
        scheduler: What ``attach`` returned.
        average: What holds the average: ``torch.optim.swa_utils.AveragedModel`` or another copy of the
            model; a dictionary from name to tensor; a list of tensors in the order of
            ``model.parameters()``, of the trainable ones, or of ``parameters``; an object with one of these,
            as ``EMAModel`` of diffusers and ``WeightAveraging`` of Lightning are; or a function that returns
            one, for an average that is replaced by another object in the course of training.
        parameters: The parameters that a list was made of, where they are others.

    Returns:
        A handle; its ``remove()`` lets the average go.

    Raises:
        ValueError: nothing in ``average`` belongs to the scheduler's adapter, or it has more rows or
            other sizes; after a growth also, if it was loaded from elsewhere meanwhile. Or the method lets
            parameters begin anew (ReMoRA).
        TypeError: ``scheduler`` is no RankScheduler, or ``average`` none of the above.
        NotImplementedError: processes have a part of the average each, and not the one that they have of the
            adapter (a copy of a sharded model, ZeRO 3).
    """
    if not isinstance(scheduler, RankScheduler):
        raise TypeError(
            f"scheduler={scheduler!r} is no RankScheduler; give what increlora_rs.attach returned."
        )
    if not scheduler.policy.averages:
        raise ValueError(
            f"scheduler: {type(scheduler.policy).__name__} lets the adapter's parameters begin anew during "
            "the training, so that their average over steps is that of no update; leave that out (MoRA: "
            "remora_interval), or the average."
        )
    given = None if parameters is None else list(parameters)
    follower = _Follower(scheduler, average, given)
    follower.start()
    return scheduler.on_growth(follower)


class _Follower:
    """Brings one average in step with one scheduler's adapter."""

    def __init__(self, scheduler: RankScheduler, average: Any, parameters: list[nn.Parameter] | None) -> None:
        self._scheduler, self._average, self._parameters = scheduler, average, parameters

    def start(self) -> None:
        """Takes the sizes of now."""
        with self._scheduler.session.at_work(), self._held() as found:
            note(self._average, found)
            for held in found:
                held.follow(self._scheduler.step)

    def __call__(self, event: GrowthEvent) -> None:
        """Takes the sizes after a growth, a load, or the end."""
        with self._held() as of_all:
            self._follow(event, of_all)

    def _follow(self, event: GrowthEvent, of_all: list[Held]) -> None:
        resized = {id(resize.parameter) for resize in event.resizes}
        # Of a module as a whole, for one tensor may not tell.
        lagging = {id(held.module) for held in of_all if event.cause == "load" and held.out_of_step()}
        restarted: dict[str, None] = {}
        for held in of_all:
            module = held.module
            named = zip(module.structure.names, module.trained, strict=True)
            new_rank = any(id(p) in resized for name, p in named if name in module.structure.active_only)
            if event.cause == "detach" and new_rank:
                # An adapter of other ranks was loaded at the end: the average is of the training.
                continue
            if event.cause == "load" and new_rank:
                if id(module) in lagging:
                    held.restart()
                    restarted[module.name] = None
                continue
            held.follow(event.step, event)
        if restarted:
            warn(
                f"an adapter of other ranks was loaded without its average: the averages of {len(restarted)} "
                f"modules, {next(iter(restarted))!r} the first, start anew from what was loaded. To go on "
                "with an average, load that of the same checkpoint, too"
            )

    def _held(self) -> AbstractContextManager[list[Held]]:
        session = self._scheduler.session
        found = parts_of(self._average, session.model, session.modules, self._parameters)
        return held_whole(found, session.places)
