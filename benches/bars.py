"""The bars that the project has set itself, computed from the figures of one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .blocks import PAIRS
from .depth import DENSE, LORTA, PRILORA
from .floor import Rates
from .layer import NOT_SLOWER
from .memory import adapters_bytes
from .methods import ADALORA, FROZEN, LITERAL, LORA, OUR_ADALORA, OURS
from .nothing import EMPTY, UPPER
from .scheduler import GROWTH
from .sizes import NAMED, Size
from .step import ARMED, UNARMED
from .timing import Samples, median, overhead, ratio
from .training import added_memory, least

DROPOUT = 0.1
# Overhead over the frozen step, ours over PEFT LoRA's, by kind of precision and dropout.
_OVERHEAD = {
    ("float32", DROPOUT): 0.40,
    ("bfloat16", DROPOUT): 0.35,
    ("float32", 0.0): 0.85,
    ("bfloat16", 0.0): 0.60,
}
# A whole step of our AdaLoRA over one of PEFT's, by kind of precision.
_ADALORA = {"float32": 0.70, "bfloat16": 0.45}
# What the scheduler's hooks may take.
_MODULES, _STEP_MS, _GROWTH_MS = 500, 2.0, 50.0
# LoRTA over itself with every update built; it and PRILoRA over PEFT LoRA of the same ranks.
_DENSE, _SAME_RANKS = 0.6, 1.1
# What MELoRA and MoRA add to the frozen layers over what they do as published, and all over PEFT LoRA's.
_AS_PUBLISHED, _OVER_LORA = {"MELoRA": 0.5, "MoRA": 0.7}, 1.1

# A layer without components over the frozen one, a step with all of them in the upper third over PEFT LoRA's.
_EMPTY, _UPPER = 1.02, 0.5
# A whole training over PEFT LoRA's, its overhead over the analytic floor, and what it adds to the frozen
# model's peak of memory over what PEFT LoRA's adds, by precision.
_TRAINING = {"float32": (0.70, 1.3, 0.12), "bfloat16": (0.40, 1.8, 0.03)}
# What the process takes for small adapted layers over the frozen ones, ours over PEFT LoRA's.
_HOST = 0.5


@dataclass(frozen=True)
class Bar:
    """A promise in a number.

    Args:
        promise: What is compared.
        value: What the run gave.
        limit: What it must keep to.
        at_most: Is the limit the largest value that will do, or the smallest?
        note: Where the value comes from, if from one of several places.
    """

    promise: str
    value: float
    limit: float
    at_most: bool = True
    note: str = ""

    @property
    def passed(self) -> bool:
        """Is the promise kept? A value that is not a number keeps none."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit


def bars(figures: Mapping[str, Any]) -> list[Bar]:
    """All bars for which the figures have a section."""
    found: list[Bar] = []
    if "step" in figures:
        found += _overheads(figures["step"]["passes"])
        found += _steps(figures["step"]["steps"])
    if "training" in figures:
        found += _training(figures["training"], NAMED[figures["size"]], figures.get("memory"))
    if "memory" in figures:
        found += _saved(figures["memory"]["model"])
    if "scheduler" in figures:
        found += _hooks(figures["scheduler"])
    if "layer" in figures:
        found.append(_never_slower(figures["layer"]))
    if "depth" in figures:
        found += _depth(figures["depth"])
    if "blocks" in figures:
        found += _blocks(figures["blocks"])
    if "nothing" in figures:
        found += _nothing(figures["nothing"])
    if "host" in figures:
        found += _host(figures["host"])
    return found


def _training(figures: Mapping[str, Any], size: Size, memory: Mapping[str, Any] | None) -> Iterator[Bar]:
    rates = Rates.from_json(figures["floor"])
    saved = {
        (record["precision"], record["dropout"]): adapters_bytes(record["bytes"], OURS)
        for record in (memory or {"model": []})["model"]
    }
    for record in figures["steps"]:
        samples, kind, dropout = record["ms"], record["precision"], record["dropout"]
        if kind not in _TRAINING or dropout != DROPOUT:
            continue
        where, (whole, over_floor, _) = f"{kind}, dropout {dropout:g}", _TRAINING[kind]
        floor_ms = least(size, rates, kind, dropout)
        value, steps = sum(samples[OURS]) / sum(samples[LORA]), len(samples[LORA])
        of_floor = (sum(samples[FROZEN]) + steps * floor_ms) / sum(samples[LORA])
        promise = f"whole training in the default form over PEFT LoRA's, {where}"
        yield Bar(promise, value, whole, note=f"the frozen model and the floor: {of_floor:.3f}")
        value = overhead(samples, OURS) / floor_ms
        yield Bar(f"its overhead over the floor, {where}", value, over_floor)
    for (kind, dropout), adds in added_memory(figures["peak"]).items():
        if kind in _TRAINING and dropout == DROPOUT:
            where, limit = f"{kind}, dropout {dropout:g}", _TRAINING[kind][2]
            kept = saved.get((kind, dropout))
            note = "" if kept is None else f"inputs that the layers save: {kept / adds[LORA]:.3f}"
            promise = f"memory that such a training adds over PEFT LoRA's, {where}"
            yield Bar(promise, adds[OURS] / adds[LORA], limit, note=note)


def _nothing(figures: Mapping[str, Any]) -> Iterator[Bar]:
    for record in figures["layers"]:
        shape = (
            f"{record['shape'][0]} to {record['shape'][1]}, {record['tokens']} tokens, {record['precision']}"
        )
        value = ratio(record["ms"], EMPTY, FROZEN)
        yield Bar(f"a layer without components over the frozen one, {shape}", value, _EMPTY)
    for record in figures["steps"]:
        where = f"{record['precision']}, dropout {record['dropout']:g}"
        value = ratio(record["ms"], UPPER, LORA)
        yield Bar(f"step with all components in the upper third over PEFT LoRA's, {where}", value, _UPPER)


def _depth(figures: Mapping[str, Any]) -> Iterator[Bar]:
    for record in figures["passes"]:
        where = f"{record['precision']}, dropout {record['dropout']:g}"
        value = ratio(record["ms"], LORTA, DENSE)
        yield Bar(f"LoRTA's projections over built updates, {where}", value, _DENSE)
        yield Bar(
            f"LoRTA's projections over PEFT LoRA's, {where}", ratio(record["ms"], LORTA, LORA), _SAME_RANKS
        )
    for record in figures["steps"]:
        where = f"{record['precision']}, dropout {record['dropout']:g}"
        value = ratio(record["ms"], PRILORA, LORA)
        yield Bar(f"PRILoRA's step over PEFT LoRA's, {where}", value, _SAME_RANKS)


def _blocks(records: list[dict[str, Any]]) -> Iterator[Bar]:
    for record in records:
        samples, where = record["ms"], f"{record['precision']}, dropout {record['dropout']:g}"
        for ours, published in PAIRS.items():
            value = overhead(samples, ours) / overhead(samples, published)
            limit = next(limit for method, limit in _AS_PUBLISHED.items() if ours.startswith(method))
            yield Bar(f"overhead of {ours} over {published}, {where}", value, limit)
            yield Bar(f"layers with {ours} over PEFT LoRA's, {where}", ratio(samples, ours, LORA), _OVER_LORA)


def _host(records: list[dict[str, Any]]) -> Iterator[Bar]:
    for record in records:
        where = f"{record['precision']}, dropout {record['dropout']:g}"
        value = overhead(record["ms"], OURS) / overhead(record["ms"], LORA)
        yield Bar(f"process's time of small layers over PEFT LoRA's, {where}", value, _HOST)


def _overheads(passes: list[dict[str, Any]]) -> Iterator[Bar]:
    for record in passes:
        kind, dropout = record["precision"], record["dropout"]
        limit = _OVERHEAD.get((kind.split()[0], dropout))
        if limit is not None:
            value = overhead(record["ms"], OURS) / overhead(record["ms"], LORA)
            yield Bar(f"overhead over PEFT LoRA's, {kind}, dropout {dropout:g}", value, limit)


def whole_step(record: Mapping[str, Any]) -> Samples:
    """The samples of a whole-step record with ours as the mean over an interval: steps before the
    importance window, steps in it, and a growth."""
    samples: Samples = dict(record["ms"])
    share = record["armed_share"]
    growth = median(record["event_ms"]) / record["interval"]
    pairs = zip(samples[ARMED], samples[UNARMED], strict=True)
    samples[OURS] = [share * armed + (1 - share) * unarmed + growth for armed, unarmed in pairs]
    return samples


def _steps(steps: list[dict[str, Any]]) -> Iterator[Bar]:
    for record in steps:
        samples, where = whole_step(record), f"{record['precision']}, dropout {record['dropout']:g}"
        yield Bar(f"whole step over PEFT LoRA's, {where}", ratio(samples, OURS, LORA), 1.0)
        yield Bar(f"whole step over PEFT AdaLoRA's, {where}", ratio(samples, OURS, ADALORA), 0.85)
        limit = _ADALORA.get(record["precision"])
        # Runs of before have no step of it.
        if limit is not None and OUR_ADALORA in samples:
            value = ratio(samples, OUR_ADALORA, ADALORA)
            yield Bar(f"AdaLoRA's whole step over PEFT AdaLoRA's, {where}", value, limit)
        yield Bar(f"literal step over ours, {where}", ratio(samples, LITERAL, OURS), 1.6, at_most=False)


def _saved(model: list[dict[str, Any]]) -> Iterator[Bar]:
    for record in model:
        if record["dropout"] == DROPOUT:
            saved = record["bytes"]
            value = adapters_bytes(saved, OURS) / adapters_bytes(saved, LORA)
            yield Bar(f"saved bytes over PEFT LoRA's, {record['precision']}, dropout {DROPOUT:g}", value, 0.4)


def _hooks(records: list[dict[str, Any]]) -> Iterator[Bar]:
    for record in records:
        if record["modules"] != _MODULES:
            continue
        took = {state: median(samples) for state, samples in record["hooks"].items() if samples}
        growth = took.pop(GROWTH)
        worst = max(took, key=lambda state: took[state])
        where = f"{_MODULES} modules, {record['form']} form"
        yield Bar(f"ms of the scheduler in a step, {where}", took[worst], _STEP_MS, note=worst)
        yield Bar(f"ms of the scheduler at a growth, {where}", growth, _GROWTH_MS)


def _never_slower(layers: list[dict[str, Any]]) -> Bar:
    worst = max(layers, key=lambda record: ratio(record["ms"], OURS, LORA))
    slower = sum(ratio(record["ms"], OURS, LORA) > NOT_SLOWER for record in layers)
    where = f"{worst['shape'][0]} to {worst['shape'][1]}, {worst['tokens']} tokens, r {worst['rank']}, "
    where += f"{worst['precision']}, dropout {worst['dropout']:g}; {slower} of {len(layers)} above"
    value = ratio(worst["ms"], OURS, LORA)
    return Bar("slowest layer over PEFT LoRA's", value, NOT_SLOWER, note=where)
