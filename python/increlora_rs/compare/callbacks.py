"""What the comparison hangs into Trainer: AdaLoRA's allocator, other choices of growth, a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..callback import IncreLoraCallback
from ..planning import schedule_of

# Where an automatic schedule's growth is over, as a share of the steps it is made for.
_AUTOMATIC_END = 0.6


class AdaLoraCallback(TrainerCallback):
    """Calls PEFT's allocator of AdaLoRA, which Trainer does not do by itself."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step, while the gradients are there; the first step is 0 to PEFT."""
        kwargs["model"].base_model.update_and_allocate(state.global_step)


class GrowthCallback(IncreLoraCallback):
    """IncreLoRA that grows otherwise: the controls of the comparison.

    It reaches into the scheduler, which offers neither for use: one is a control, the other can be had
    by ``tinit``, ``deltaT`` and ``top_h`` once the number of modules is known.

    Args:
        random_seed: Grow modules by random scores, drawn anew at each growth, in place of their
            importance; None: by importance.
        growth_end: Share of the steps at which the budget is reached; None: the automatic one.
    """

    def __init__(self, random_seed: int | None, growth_end: float | None) -> None:
        super().__init__()
        self._random_seed = random_seed
        self._growth_end = growth_end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches the scheduler, then changes it."""
        super().on_train_begin(args, state, control, **kwargs)
        scheduler = self.scheduler
        if scheduler is None:
            raise RuntimeError("no scheduler was attached; please report it")
        if self._growth_end is not None:
            config, steps = scheduler._config, state.max_steps
            wish = (steps // 10 if config.tinit is None else config.tinit, config.deltaT, config.top_h)
            like = round(steps * self._growth_end / _AUTOMATIC_END)
            scheduler.schedule = schedule_of(
                config, scheduler._modules, like, scheduler._budget, (*wish, config.add_r)
            )
            scheduler._arm()
        if self._random_seed is not None:
            generator = np.random.default_rng(self._random_seed)
            modules, at_growth = len(scheduler.ranks), scheduler._scores.at_growth

            def by_lot() -> Any:
                at_growth()
                # 0 would count as a module without any importance.
                return generator.uniform(0.1, 1.0, modules)

            scheduler._scores.at_growth = by_lot  # type: ignore[method-assign]


class StepClock(TrainerCallback):
    """Seconds of every optimizer step, without evaluations and the loading of batches."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.seconds: list[float] = []
        self._advance = advance
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the forward pass."""
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step and the growth."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        self._advance()
