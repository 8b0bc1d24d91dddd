"""What the comparison hangs into Trainer: AdaLoRA's allocator, other choices of growth, a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import TrainerCallback

from ..methods.increlora.growth import Growth
from ..training.callback import IncreLoraCallback


class AdaLoraCallback(TrainerCallback):
    """Calls PEFT's allocator of AdaLoRA, which Trainer does not do by itself."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step, while the gradients are there; the first step is 0 to PEFT."""
        kwargs["model"].base_model.update_and_allocate(state.global_step)


class RandomGrowthCallback(IncreLoraCallback):
    """IncreLoRA that grows modules drawn by lot: the control of ``importance="gradient"``.

    Args:
        seed: Of the lot, drawn anew at each growth.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(policy=partial(Growth, choose_by=self._by_lot))
        self._lots = np.random.default_rng(seed)

    def _by_lot(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        # 0 would count as a module without any importance.
        return self._lots.uniform(0.1, 1.0, len(scores))


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
