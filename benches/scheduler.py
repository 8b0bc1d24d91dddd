"""What the scheduler's hooks add to ``optimizer.step()``, by the number of adapted modules."""

from __future__ import annotations

from typing import Any

import torch
from increlora_rs import IncreLoraConfig, RankScheduler, attach
from peft import get_peft_model
from rich.progress import track
from torch import nn

from .sizes import Size
from .step import adamw
from .timing import no_collection, once, processor, wait

# In the default form ranks move, in the others they grow; "sensitivity" has LoRA's start and the paper's
# importance.
FORMS = ("default", "gradient", "sensitivity", "paper")
# Of a step: nothing to do, importance smoothed, newborn rows corrected, both, and a growth, or a move.
QUIET, ARMED, YOUNG, YOUNG_ARMED, GROWTH = "quiet", "armed", "newborn rows", "armed, newborn rows", "growth"
STATES = (QUIET, ARMED, YOUNG, YOUNG_ARMED, GROWTH)
_INTERVAL = 20
_WINDOW = 8
_SHARE_THAT_GROWS = 10
_STEPS = 100_000


class Sum(nn.Module):
    """Many linear layers on one input, added up; they share one frozen weight, to save memory."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))
        shared = nn.Parameter(torch.randn(width, width) / width**0.5)
        for layer in self.layers:
            layer.weight = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of the outputs."""
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


def measure(size: Size) -> list[dict[str, Any]]:
    """A record for each number of modules and form: samples in milliseconds of the hooks in each state, and
    of the rest of ``optimizer.step()``, both in processor time."""
    cases = [(count, form) for count in size.modules for form in FORMS]
    return [_case(size, *case) for case in track(cases, description="scheduler")]


def _config(form: str, count: int, intervals: int) -> IncreLoraConfig:
    shared: dict[str, Any] = {
        "lora_alpha": 16,
        "target_modules": r"layers\.\d+",
        "tinit": _INTERVAL - 1,
        "deltaT": _INTERVAL,
    }
    if form == "default":
        # A little above the budget, so that every event has something to do.
        return IncreLoraConfig(r=7, init_r=8, growth_end=2 * intervals * _INTERVAL / _STEPS, **shared)
    make = IncreLoraConfig.paper if form == "paper" else IncreLoraConfig
    return make(
        importance="gradient" if form == "gradient" else "sensitivity",
        r=8,
        init_r=4,
        top_h=max(1, count // _SHARE_THAT_GROWS),
        importance_window=_WINDOW,
        **shared,
    )


class Clock:
    """Times what stands between two hooks before an optimizer's update, and two after it, in processor time.

    Args:
        optimizer: The optimizer, before and after the hooks to be timed are registered with it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.ms = 0.0
        self._optimizer = optimizer
        self._start()

    def _start(self) -> None:
        self._optimizer.register_step_pre_hook(self._begin)
        self._optimizer.register_step_post_hook(self._begin)

    def stop(self) -> None:
        """All hooks to be timed are registered."""
        self._optimizer.register_step_pre_hook(self._end)
        self._optimizer.register_step_post_hook(self._end)

    def _begin(self, *_: Any) -> None:
        wait()
        self.ms -= processor() * 1e3

    def _end(self, *_: Any) -> None:
        wait()
        self.ms += processor() * 1e3

    def read(self) -> float:
        """Milliseconds since the last reading."""
        read, self.ms = self.ms, 0.0
        return read


def _case(size: Size, count: int, form: str) -> dict[str, Any]:
    torch.manual_seed(0)
    config = _config(form, count, size.intervals)
    model = get_peft_model(Sum(size.module_width, count), config).to(size.device).train()
    optimizer = adamw(model)
    clock = Clock(optimizer)
    scheduler = attach(model, optimizer, total_steps=_STEPS, lr_warmup_steps=50)
    clock.stop()
    x = torch.randn(1, size.module_width, device=size.device)
    hooks: dict[str, list[float]] = {state: [] for state in STATES}
    plain: list[float] = []
    with no_collection():
        for step in range(1, size.intervals * _INTERVAL + 1):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            took = once(optimizer.step, processor)
            state, added = _state(step, form), clock.read()
            hooks[state].append(round(added, 4))
            plain.append(round(took - added, 4))
            if state == GROWTH:
                _check_growth(scheduler, step)
    return {"modules": count, "form": form, "hooks": hooks, "plain": plain}


def _state(step: int, form: str) -> str:
    left = -step % _INTERVAL
    if left == 0:
        return GROWTH
    if form == "default":
        # It measures in every step, and has few newborn rows or none.
        return QUIET
    if step > _INTERVAL:
        return YOUNG_ARMED if left < _WINDOW else YOUNG
    return ARMED if left < _WINDOW else QUIET


def _check_growth(scheduler: RankScheduler, step: int) -> None:
    if step not in scheduler.history["step"]:
        raise RuntimeError(f"no rank changed at step {step}, so its time is no growth's")
