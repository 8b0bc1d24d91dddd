"""The scheduler in ``transformers.Trainer``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from transformers import SchedulerType, TrainerCallback

from ..support.warning import warn
from . import trainer_sharding
from .averages import keep_average
from .events import GrowthEvent
from .fit import schedulers_of
from .scheduler import RankScheduler, attach
from .session import PolicyMaker
from .trainer_log import speak_first

logger = logging.getLogger(__package__)


class IncreLoraCallback(TrainerCallback):
    """Makes ranks grow in ``Trainer``: ``Trainer(..., callbacks=[IncreLoraCallback()])``.

    The number of steps, the learning rate's warm-up and schedule, and the loss scaler come from the
    Trainer. Its logs gain ``total_rank`` and ``orth_reg``: the regulariser's value without its weight, also
    where that is 0, as by default. After training ``scheduler`` still holds the ranks and the history.
    Before the first step a line goes to the log (``logging``, at level INFO): how many bits the adapter can
    hold, and the training's data (:meth:`increlora_rs.RankScheduler.capacity`).

    Args:
        log_ranks: Give TensorBoard, Weights & Biases and whatever else ``report_to`` names the rank and
            the score of every module at each logging step, as ``increlora/rank/NAME`` and
            ``increlora/score/NAME`` (to which Trainer puts its ``train/``). They are not printed, nor
            kept in ``trainer_state.json``. By the gradient a score is that of the last growth.

        averages: Averages of the weights that are to grow with the ranks, each as for
            :func:`increlora_rs.keep_average`.
        on_growth: Called after each growth, as :meth:`increlora_rs.RankScheduler.on_growth` has it. In
            ``on_train_begin`` of callbacks that stand behind this one, its ``scheduler`` is attached already.
        policy: For experiments: what decides in the place of the method's own; see
            :func:`increlora_rs.attach`.

    Raises:
        TypeError: an argument is of another type.
        ValueError: at the start of the training, as :func:`increlora_rs.attach` and
            :func:`increlora_rs.keep_average` do.
    """

    def __init__(
        self,
        log_ranks: bool = False,
        *,
        averages: Sequence[Any] = (),
        on_growth: Callable[[GrowthEvent], Any] | None = None,
        policy: PolicyMaker | None = None,
    ) -> None:
        if not isinstance(log_ranks, bool):
            raise TypeError(f"log_ranks={log_ranks!r} must be True or False.")
        if not isinstance(averages, (list, tuple)):
            raise TypeError(
                f"averages: a {type(averages).__name__} is no list; give a list of averages, such as [ema]."
            )
        if on_growth is not None and not callable(on_growth):
            raise TypeError(
                f"on_growth={on_growth!r} cannot be called; give a function that takes a GrowthEvent."
            )
        self.scheduler: RankScheduler | None = None
        self._log_ranks = log_ranks
        self._averages, self._on_growth, self._policy = tuple(averages), on_growth, policy

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the adapter ready for the Trainer's FSDP, if it uses that."""
        if kwargs.get("model") is not None:
            trainer_sharding.prepare(kwargs["model"], args.device)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches the scheduler to the Trainer's optimizer."""
        optimizer = kwargs["optimizer"]
        for running in (self.scheduler, *schedulers_of(kwargs["model"])):
            # Left by a training that was interrupted.
            if running is not None:
                running.detach()
        linear = args.lr_scheduler_type == SchedulerType.LINEAR
        self.scheduler = attach(
            kwargs["model"],
            optimizer,
            total_steps=state.max_steps,
            lr_warmup_steps=args.get_warmup_steps(state.max_steps),
            lr_schedule="auto" if linear else "follow",
            scaler=getattr(optimizer, "scaler", None),
            policy=self._policy,
        )
        speak_first(self, f"{self.scheduler.method}/")
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        logger.info("%s", self.scheduler.capacity(dataset))
        if state.global_step and not self.scheduler.restored:
            warn(
                f"resuming at step {state.global_step} from a checkpoint without the scheduler's state "
                "(no optimizer.pt, or one of another method): scores and restart warm-up start anew"
            )
            self.scheduler.step = state.global_step
        for average in self._averages:
            keep_average(self.scheduler, average)
        if self._on_growth is not None:
            self.scheduler.on_growth(self._on_growth)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds ``total_rank`` and ``orth_reg``, and what ``log_ranks`` asks for, to the log of a training
        step."""
        logs = kwargs.get("logs")
        if self.scheduler is None or logs is None or "loss" not in logs:
            return
        ours = self.scheduler.logs()
        logs.update(ours)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(ours)
        if self._log_ranks:
            logs.update(self.scheduler.scalars())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the scheduler off the optimizer."""
        if self.scheduler is not None:
            self.scheduler.detach()
