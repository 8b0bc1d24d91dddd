"""A whole training in the default form, events and all, beside PEFT's LoRA and the frozen model: time and
memory."""

from __future__ import annotations

import sys
from typing import Any

from increlora_rs import RankScheduler, attach
from rich.progress import track

from . import floor, memory
from .methods import FROZEN, LORA, OURS, PRECISIONS, batch, training_model
from .sizes import NAMED, Size
from .step import adamw
from .timing import interleave, processor

METHODS = (FROZEN, LORA, OURS)
# Of the processes whose memory is looked at: enough for events on both sides of the trial's verdict.
_STEPS = 12


class Whole:
    """A training of ``steps`` steps of one of :data:`METHODS`."""

    scheduler: RankScheduler | None = None

    def __init__(self, method: str, size: Size, precision: str, dropout: float, steps: int) -> None:
        self.model = training_model(method, size, precision=PRECISIONS[precision], dropout=dropout)
        self.optimizer = None if method == FROZEN else adamw(self.model)
        self.data = batch(size, PRECISIONS[precision])
        if method == OURS:
            assert self.optimizer is not None
            self.scheduler = attach(self.model, self.optimizer, total_steps=steps)

    def step(self) -> None:
        """zero_grad, forward, backward, update, and all that the scheduler does."""
        embeddings, target = self.data
        embeddings.grad = None
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        self.model(embeddings, target).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()


def measure(size: Size) -> dict[str, Any]:
    """``steps``: samples in milliseconds of processor time, one for each step of a whole training; ``peak``:
    bytes of a process with the model built, and at most in such a training; ``floor``: rates in seconds of
    the processor."""
    return {
        "floor": floor.measure(size, processor).to_json(),
        "steps": [
            _steps(size, precision, size.dropouts[-1])
            for precision in track(size.precisions, description="training: steps")
        ],
        "peak": [
            {"precision": precision, "dropout": size.dropouts[-1], "method": method}
            | peak(size, method, precision, size.dropouts[-1])
            for precision in size.peaks
            for method in track(METHODS, description=f"training: peak, {precision}")
        ],
    }


def _steps(size: Size, precision: str, dropout: float) -> dict[str, Any]:
    steps = size.training_steps
    trainings = {name: Whole(name, size, precision, dropout, size.step_warmup + steps) for name in METHODS}
    samples = interleave(
        {name: training.step for name, training in trainings.items()},
        seconds=0.0,
        rounds=(steps, steps),
        warmup=size.step_warmup,
        clock=processor,
    )
    ms = {name: [round(value, 3) for value in values] for name, values in samples.items()}
    return {"precision": precision, "dropout": dropout, "ms": ms}


def least(size: Size, rates: floor.Rates, precision: str, dropout: float) -> float:
    """Milliseconds of a step that the adapters' arithmetic and traffic take at these rates."""
    tokens, element = size.batch * size.tokens, floor.ELEMENT[precision]
    works = [
        floor.adapter(shape, tokens, size.rank, dropout, element) for shape in floor.layers_of_step(size)
    ]
    return sum(rates.milliseconds(work, element) for work in works)


def added_memory(records: list[dict[str, Any]]) -> dict[tuple[str, float], dict[str, int]]:
    """By precision and dropout, of each method: the bytes that its peak is above the frozen model's."""
    by_case: dict[tuple[str, float], dict[str, int]] = {}
    for record in records:
        by_case.setdefault((record["precision"], record["dropout"]), {})[record["method"]] = record["peak"]
    return {
        case: {name: peak - peaks[FROZEN] for name, peak in peaks.items() if name != FROZEN}
        for case, peaks in by_case.items()
    }


def peak(size: Size, method: str, precision: str, dropout: float) -> dict[str, int]:
    """With the model built, and at most in a training: as :func:`benches.memory.peak`."""
    case = method, precision, dropout
    return memory.peak_of(
        "benches.training", size, case, lambda: Whole(method, size, precision, dropout, _STEPS), _train
    )


def _train(training: Whole) -> None:
    for _ in range(_STEPS):
        training.step()


def _main(name: str, method: str, precision: str, dropout: str) -> None:
    memory.print_peak(lambda: Whole(method, NAMED[name], precision, float(dropout), _STEPS), _train)


if __name__ == "__main__":
    from .timing import prepare

    prepare()
    _main(*sys.argv[1:])
