"""``python -m benches.device``: an adapted layer on a GPU, forward and backward. What the GPU itself takes,
what the process takes to ask for it, and in how many kernels."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from .layer import call
from .methods import FROZEN, LORA, OURS
from .sizes import LayerCase
from .tables import Table

CASES = (LayerCase((768, 768), 4096, 8), LayerCase((4096, 4096), 8192, 8))
PRECISIONS = ("bfloat16", "bfloat16 throughout")
DROPOUTS = (0.0, 0.1)
METHODS = (FROZEN, LORA, OURS)
_WARM_UP, _CALLS, _PROFILED = 10, 30, 5


@dataclass(frozen=True)
class Cost:
    """What one call takes, in microseconds: until it returns, until the GPU is done (both means of a row of
    calls), on the GPU alone; and its kernels."""

    host: float
    whole: float
    device: float
    kernels: float


def cost(work: Callable[[], object]) -> Cost:
    """The cost of ``work`` on the current CUDA device."""
    for _ in range(_WARM_UP):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_CALLS):
        work()
    host = (time.perf_counter() - start) / _CALLS
    torch.cuda.synchronize()
    whole = (time.perf_counter() - start) / _CALLS
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(_PROFILED):
            work()
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() or () if event.device_type.name == "CUDA"]
    device = sum(event.time_range.elapsed_us() for event in kernels) / _PROFILED
    return Cost(host * 1e6, whole * 1e6, device, len(kernels) / _PROFILED)


def table(cases: tuple[LayerCase, ...] = CASES) -> Table:
    """A row for each case, precision, dropout and method."""
    columns = [
        "in, out",
        "tokens",
        "precision",
        "dropout",
        "method",
        "GPU us",
        "kernels",
        "whole us",
        "host us",
    ]
    found = Table("An adapted layer on the GPU", columns)
    for case in cases:
        for precision in PRECISIONS:
            for dropout in DROPOUTS:
                for method in METHODS:
                    took = cost(call(method, case, precision, dropout, "cuda"))
                    shape = f"{case.shape[0]}, {case.shape[1]}"
                    numbers = took.device, took.kernels, took.whole, took.host
                    found.add(shape, case.tokens, precision, f"{dropout:g}", method, *numbers)
    return found


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("python -m benches.device: torch sees no CUDA device")
    print(torch.cuda.get_device_name())
    console = Console()
    console.width = max(console.width, 150)
    console.print(table())
