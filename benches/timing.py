"""Fair timing on a machine that others may use: interleaved rounds, medians, and a look at who else
was busy."""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

THREADS = 2
# Share of the machine that others may take before the figures are called into question.
QUIET = 0.05

Samples = dict[str, list[float]]


def prepare() -> None:
    """Two threads, the same random numbers at every run."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keeps Python's garbage collector out of the timings."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def wait() -> None:
    """Until the GPU has done all that it was given, where there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def once(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds of one call by a clock of seconds, and on a GPU of all that it asks for."""
    wait()
    start = clock()
    call()
    wait()
    return (clock() - start) * 1e3


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    rounds: tuple[int, int],
    warmup: int = 2,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Milliseconds of each call, a sample a round.

    Every round makes each call once, in an order of its own, so that a slow moment of the machine
    hits all of them alike and none profits from its predecessor's caches.

    Args:
        calls: What is compared, by name.
        seconds: Stops after the round that passes this.
        rounds: At least and at most so many.
        warmup: Rounds before that are thrown away.
        seed: Of the orders.
        clock: Seconds; of the process alone where others may use the machine.
    """
    samples: Samples = {name: [] for name in calls}
    order = random.Random(seed)
    names = list(calls)
    with no_collection():
        for _ in range(warmup):
            for name in names:
                calls[name]()
        end = time.perf_counter() + seconds
        for done in range(rounds[1]):
            if done >= rounds[0] and time.perf_counter() > end:
                break
            for name in order.sample(names, len(names)):
                samples[name].append(once(calls[name], clock))
    return samples


def joined(first: Samples, second: Samples) -> Samples:
    """Both runs' samples."""
    return {name: first[name] + second[name] for name in first}


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """Interquartile range over the median."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


def ratio(samples: Mapping[str, Sequence[float]], name: str, other: str) -> float:
    """Median over the rounds of ``name``'s time over ``other``'s in the same round."""
    return median([a / b for a, b in zip(samples[name], samples[other], strict=True)])


def overhead(samples: Mapping[str, Sequence[float]], name: str, base: str = "frozen") -> float:
    """Median over the rounds of what ``name`` takes longer than ``base``, in milliseconds."""
    return median([a - b for a, b in zip(samples[name], samples[base], strict=True)])


@dataclass
class Busy:
    """How much of the machine others used meanwhile: a share of all cores, None where it is unknown."""

    others: float | None = None


@contextmanager
def watch_others() -> Iterator[Busy]:
    """Fills in the :class:`Busy` that it gives when the block ends."""
    busy = Busy()
    before = _cpu_seconds()
    yield busy
    after = _cpu_seconds()
    if before is not None and after is not None and after[0] > before[0]:
        whole, used, own = (b - a for a, b in zip(before, after, strict=True))
        busy.others = max(0.0, used - own) / whole


def _cpu_seconds() -> tuple[float, float, float] | None:
    """CPU seconds of the machine: all, used by anyone, used by this process and its children."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, idle, waiting, *rest = ticks
    hertz = os.sysconf("SC_CLK_TCK")
    used = user + nice + system + sum(rest)
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return (used + idle + waiting) / hertz, used / hertz, own
