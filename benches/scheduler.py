"""What the scheduler's hooks add to ``optimizer.step()``, by the number of adapted modules."""

from __future__ import annotations

from typing import Any

import torch
from increlora_rs import IncreLoraConfig, RankScheduler, attach
from peft import get_peft_model
from rich.progress import track
from torch import nn

from .layer import trainable
from .sizes import Size
from .step import adamw
from .timing import no_collection, once

FORMS = ("default", "paper")
# Of a step: nothing to do, importance smoothed, newborn rows corrected, both, and a growth.
QUIET, ARMED, YOUNG, YOUNG_ARMED, GROWTH = "quiet", "armed", "newborn rows", "armed, newborn rows", "growth"
STATES = (QUIET, ARMED, YOUNG, YOUNG_ARMED, GROWTH)
_INTERVAL = 20
_WINDOW = 8
_SHARE_THAT_GROWS = 10


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
    """A record for each number of modules and form: samples of ``optimizer.step()`` in milliseconds,
    attached and plain, in each state."""
    cases = [(count, form) for count in size.modules for form in FORMS]
    return [_case(size, *case) for case in track(cases, description="scheduler")]


def _config(form: str, count: int) -> IncreLoraConfig:
    make = IncreLoraConfig.paper if form == "paper" else IncreLoraConfig
    return make(
        r=8,
        init_r=4,
        lora_alpha=16,
        target_modules=r"layers\.\d+",
        tinit=_INTERVAL - 1,
        deltaT=_INTERVAL,
        top_h=max(1, count // _SHARE_THAT_GROWS),
        importance_window=_WINDOW,
    )


def _case(size: Size, count: int, form: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = get_peft_model(Sum(size.module_width, count), _config(form, count)).train()
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100_000, lr_warmup_steps=50)
    x = torch.randn(1, size.module_width)
    plain = _plain(model)
    attached: dict[str, list[float]] = {state: [] for state in STATES}
    unattached: dict[str, list[float]] = {state: [] for state in STATES}
    with no_collection():
        for step in range(1, size.intervals * _INTERVAL + 1):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            _give_gradients(model, plain)
            state = _state(step)
            # Taking turns at being first.
            if step % 2:
                before = once(plain.step)
                took = once(optimizer.step)
            else:
                took = once(optimizer.step)
                before = once(plain.step)
            attached[state].append(round(took, 4))
            unattached[state].append(round(before, 4))
            if state == GROWTH:
                _check_growth(scheduler, step)
                plain = _plain(model)
    return {"modules": count, "form": form, "attached": attached, "plain": unattached}


def _state(step: int) -> str:
    left = -step % _INTERVAL
    if left == 0:
        return GROWTH
    if step > _INTERVAL:
        return YOUNG_ARMED if left < _WINDOW else YOUNG
    return ARMED if left < _WINDOW else QUIET


def _check_growth(scheduler: RankScheduler, step: int) -> None:
    if step not in scheduler.history["step"]:
        raise RuntimeError(f"no rank grew at step {step}, so its time is no growth's")


def _plain(model: nn.Module) -> torch.optim.AdamW:
    """The same optimizer on tensors of the same shapes, with nobody attached, its state made."""
    copies = nn.ParameterList(nn.Parameter(parameter.detach().clone()) for parameter in trainable(model))
    for parameter in copies:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(copies)
    optimizer.step()
    return optimizer


def _give_gradients(model: nn.Module, plain: torch.optim.Optimizer) -> None:
    """Fresh gradients in fresh memory, as the attached optimizer's are."""
    for parameter, copy in zip(trainable(model), plain.param_groups[0]["params"], strict=True):
        assert parameter.grad is not None
        copy.grad = parameter.grad.clone()
