"""What the adapters of small layers cost the process that asks for them: time of Python, of the binding and
of libtorch's small calls, for layers whose arithmetic takes next to none."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import track
from torch import nn

from . import methods
from .layer import trainable
from .methods import FROZEN, LORA, OURS, PRECISIONS
from .sizes import Size
from .timing import interleave

LAYERS, WIDTH, TOKENS, RANK = 8, 64, 8, 8
HOST_PRECISIONS = ("float32", "bfloat16 throughout")
# Passes of one sample, and samples for one that another section takes.
_PASSES, _MORE = 10, 4


def measure(size: Size) -> list[dict[str, Any]]:
    """A record for each precision and dropout: milliseconds of the process, one thread, of a forward and
    backward pass through layers in a row."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases = [(precision, dropout) for precision in HOST_PRECISIONS for dropout in size.dropouts]
        return [_case(size, *case) for case in track(cases, description="host")]
    finally:
        torch.set_num_threads(threads)


def _case(size: Size, precision: str, dropout: float) -> dict[str, Any]:
    calls = {name: _call(name, precision, dropout, size.device) for name in (FROZEN, LORA, OURS)}
    samples = interleave(
        calls,
        seconds=size.seconds,
        rounds=(size.rounds[0], _MORE * size.rounds[1]),
        clock=time.process_time,
    )
    ms = {name: [round(value / _PASSES, 5) for value in values] for name, values in samples.items()}
    return {"precision": precision, "dropout": dropout, "ms": ms}


def _call(method: str, precision: str, dropout: float, device: str) -> Callable[[], None]:
    shape, dtypes = (WIDTH, WIDTH), PRECISIONS[precision]
    layers = methods.adapted_layers(
        method, shape, precision=dtypes, rank=RANK, dropout=dropout, device=device, count=LAYERS
    )
    model = nn.Sequential(*layers)
    x, gy = (torch.randn(TOKENS, WIDTH, device=device).to(dtypes.base) for _ in range(2))
    learns = [x.requires_grad_(), *trainable(model)]

    def passes() -> None:
        for _ in range(_PASSES):
            for tensor in learns:
                tensor.grad = None
            model(x).backward(gy)

    return passes
