"""The training step of a small BERT: what the adapters add to forward and backward, and whole steps with
optimizer, regulariser, scores and growth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from increlora_rs import RankScheduler, attach
from rich.progress import track
from torch import Tensor, nn

from . import literal
from .layer import trainable
from .methods import (
    ADALORA,
    INTERVAL,
    LITERAL,
    LORA,
    METHODS,
    OUR_ADALORA,
    OURS,
    PRECISIONS,
    TOP_H,
    batch,
    training_model,
)
from .sizes import Size
from .timing import interleave, median, no_collection, once

# Ours within the importance window, before it, and in the default form once the budget is spent.
ARMED, UNARMED, SPENT = "armed", "unarmed", "budget spent"
_TOTAL_STEPS = 10_000
_LR_WARMUP = 50
_LITERAL_ORTHOGONALITY = 0.1


def measure(size: Size) -> dict[str, Any]:
    """Samples in milliseconds: ``passes`` forward and backward, ``steps`` whole steps."""
    cases = [(p, d) for p in size.precisions for d in size.dropouts]
    passes = [_passes(size, *case) for case in track(cases, description="step: forward, backward")]
    steps = [
        _steps(size, precision, size.dropouts[-1])
        for precision in track(size.precisions, description="step: whole")
    ]
    return {"passes": passes, "steps": steps}


def _rounded(samples: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 3) for value in values] for name, values in samples.items()}


def forward_backward(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """One forward and backward pass from fresh gradients."""
    embeddings, target = data
    embeddings.grad = None
    model.zero_grad()
    model(embeddings, target).loss.backward()


def _passes(size: Size, precision: str, dropout: float) -> dict[str, Any]:
    data = batch(size, PRECISIONS[precision])

    def call(method: str) -> Callable[[], None]:
        model = training_model(method, size, precision=PRECISIONS[precision], dropout=dropout)
        if method == OURS:
            # Attached, as in every training, with nothing left to grow.
            attach(model, adamw(model), total_steps=_TOTAL_STEPS)
        return lambda: forward_backward(model, data)

    calls = {method: call(method) for method in METHODS}
    samples = interleave(calls, seconds=size.step_seconds, rounds=size.rounds, warmup=size.step_warmup)
    return {"precision": precision, "dropout": dropout, "ms": _rounded(samples)}


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The optimizer of every method."""
    return torch.optim.AdamW(trainable(model), lr=1e-4)


class Training:
    """A whole training step of one method; ``skip`` takes steps of a small batch, to get ahead."""

    scheduler: RankScheduler | None = None

    def __init__(self, method: str, size: Size, precision: str, dropout: float, *, growing: bool = True):
        self.method = method
        self.model = training_model(
            method, size, precision=PRECISIONS[precision], dropout=dropout, growing=growing
        )
        # AdaLoRA's model adds its regulariser; PeftModel without a task type calls past it.
        self.forward: Any = self.model.base_model if method == ADALORA else self.model
        self.optimizer = adamw(self.model)
        self.data = batch(size, PRECISIONS[precision])
        # Two tokens: to one alone, attention gives query and key no gradient.
        self.small = batch(size, PRECISIONS[precision], count=1, tokens=2)
        self.steps = 0
        self.literal: literal.LiteralScheduler | None = None
        if method in (OURS, OUR_ADALORA):
            self.scheduler = attach(
                self.model, self.optimizer, total_steps=_TOTAL_STEPS, lr_warmup_steps=_LR_WARMUP
            )
        elif method == LITERAL:
            self.literal = literal.LiteralScheduler(
                literal.literal_layers(self.model), self.optimizer, interval=INTERVAL, top_h=TOP_H
            )

    def step(self) -> None:
        """One step of the whole batch."""
        self._step(self.data)

    def skip(self, steps: int) -> None:
        """So many steps of the small batch."""
        for _ in range(steps):
            self._step(self.small)

    def _step(self, data: tuple[Tensor, Tensor]) -> None:
        self.backward(data)
        self.update()

    def backward(self, data: tuple[Tensor, Tensor]) -> None:
        """Gradients of the loss, with the regulariser where the method has it in its loss."""
        embeddings, target = data
        embeddings.grad = None
        self.optimizer.zero_grad()
        loss = self.forward(embeddings, target).loss
        if self.literal is not None:
            loss = loss + _LITERAL_ORTHOGONALITY * literal.orthogonality(self.literal.layers)
        loss.backward()

    def update(self) -> None:
        """All that comes after the backward pass."""
        self.steps += 1
        if self.literal is not None:
            self.literal.before_step()
        self.optimizer.step()
        if self.literal is not None:
            self.literal.after_step()
        if self.method == ADALORA:
            self.forward.update_and_allocate(self.steps)


def _steps(size: Size, precision: str, dropout: float) -> dict[str, Any]:
    """Ours is timed at three places of the interval after the first growth, where there are newborn
    rows: before the importance window, inside it, and at the growth."""
    trainings = {
        name: Training(name, size, precision, dropout) for name in (LORA, ADALORA, OUR_ADALORA, LITERAL)
    }
    trainings[SPENT] = Training(OURS, size, precision, dropout, growing=False)
    # At the end of an interval, and so at the start of the next, before the window.
    trainings[UNARMED], event, share = _events(size, precision, dropout)
    window = round(INTERVAL * share)
    trainings[ARMED] = Training(OURS, size, precision, dropout)
    trainings[ARMED].skip(2 * INTERVAL - window)
    most = min(size.rounds[1], min(window, INTERVAL - window) - size.step_warmup)
    samples = interleave(
        {name: training.step for name, training in trainings.items()},
        seconds=size.step_seconds,
        rounds=(min(size.rounds[0], most), most),
        warmup=size.step_warmup,
    )
    return {
        "precision": precision,
        "dropout": dropout,
        "interval": INTERVAL,
        "armed_share": share,
        "event_ms": [round(value, 3) for value in event],
        "ms": _rounded(samples),
    }


def _events(size: Size, precision: str, dropout: float) -> tuple[Training, list[float], float]:
    """What growth events add to the optimizer's step, in milliseconds, and the share of the steps in
    which the importance is computed, seen by the scores' moving; and the training, after the last event."""
    training = Training(OURS, size, precision, dropout)
    scheduler = training.scheduler
    assert scheduler is not None
    training.skip(INTERVAL)
    armed, events = 0, []
    with no_collection():
        for _ in range(size.events):
            before: list[float] = []
            for _ in range(INTERVAL):
                scores, grown = scheduler.scores, len(scheduler.history)
                training.backward(training.small)
                took = once(training.update)
                moved = scheduler.scores != scores
                armed += moved
                if len(scheduler.history) > grown:
                    events.append(took - median(before))
                elif moved:
                    before.append(took)
    return training, events, armed / (size.events * INTERVAL)
