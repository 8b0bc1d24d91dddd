"""What is known of optimizers, by class: how the state of a parameter starts, key by key."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# Of new rows of a parameter and the parameter's group: how their state starts. None: that is not known.
Start = Callable[[Tensor, Mapping[str, Any]], Tensor | None]


@dataclass(frozen=True)
class Entry:
    """What is known of one key of an optimizer's state.

    Args:
        kind: "rows": a number for each of the parameter's, in its shape; "flat": so, in one dimension;
            "stacked": several of its shape, one after the other; "factor": numbers for whole rows or
            columns, which no growth leaves as they are; "whole": something that has no rows; "given": so,
            and the optimizer's constructor puts it there, so that a state that starts anew needs it, too.
        start: How the state of new rows starts.
        is_weights: Does it hold weights, so that it changes its scale when the parameter does?
    """

    kind: Literal["rows", "flat", "stacked", "factor", "whole", "given"]
    start: Start | None = None
    is_weights: bool = False


def _zeros(rows: Tensor, _: Mapping[str, Any]) -> Tensor:
    return torch.zeros_like(rows)


def _themselves(rows: Tensor, _: Mapping[str, Any]) -> Tensor:
    return rows


def _setting(name: str) -> Start:
    return lambda rows, group: torch.full_like(rows, float(group[name])) if name in group else None


def _undampened(rows: Tensor, group: Mapping[str, Any]) -> Tensor | None:
    # The first gradient enters the buffer whole, all others less the dampening: from 0 only without any is it
    # the same.
    return None if group.get("dampening") else torch.zeros_like(rows)


WHOLE, GIVEN, FACTOR = Entry("whole"), Entry("given"), Entry("factor")
ZERO, COPY = Entry("rows", _zeros), Entry("rows", _themselves, is_weights=True)
MOMENTUM = Entry("rows", _undampened)

_ADAM = {"step": WHOLE, "exp_avg": ZERO, "exp_avg_sq": ZERO, "max_exp_avg_sq": ZERO}
_ADAFACTOR = {
    "step": WHOLE,
    "RMS": WHOLE,
    "exp_avg": ZERO,
    "exp_avg_sq": ZERO,
    "exp_avg_sq_row": FACTOR,
    "exp_avg_sq_col": FACTOR,
}
_SCHEDULE_FREE = {"z": COPY, "x": COPY, "y": COPY, "exp_avg_sq": ZERO}
_SCHEDULE_FREE_ADAM = (
    "AdamWScheduleFree",
    "AdamWScheduleFreeClosure",
    "AdamWScheduleFreePaper",
    "AdamWScheduleFreeReference",
    "RAdamScheduleFree",
    "RAdamScheduleFreeClosure",
)
_BITSANDBYTES = {"step": WHOLE, "unorm_vec": WHOLE, "state1": ZERO, "state2": ZERO}
_OPTIMI = {"step": WHOLE, "eps_sq": WHOLE, "exp_avg": ZERO, "exp_avg_sq": ZERO, "kahan_comp": ZERO}

# By top package and class. Only what somebody read in the optimizer's source stands here.
_KNOWN: dict[str, dict[str, Entry]] = {
    "torch.Adadelta": {"step": WHOLE, "square_avg": ZERO, "acc_delta": ZERO},
    "torch.Adafactor": {"step": WHOLE, "row_var": FACTOR, "col_var": FACTOR, "variance": ZERO},
    "torch.Adagrad": {"step": WHOLE, "sum": Entry("rows", _setting("initial_accumulator_value"))},
    "torch.Adam": _ADAM,
    "torch.AdamW": _ADAM,
    "torch.Adamax": {"step": WHOLE, "exp_avg": ZERO, "exp_inf": ZERO},
    # An average of the weights, which begins when the optimizer says so; until then it is the weights.
    "torch.ASGD": {"step": WHOLE, "eta": WHOLE, "mu": WHOLE, "ax": COPY},
    "torch.Muon": {"momentum_buffer": ZERO},
    "torch.NAdam": {"step": WHOLE, "mu_product": WHOLE, "exp_avg": ZERO, "exp_avg_sq": ZERO},
    "torch.RAdam": {"step": WHOLE, "exp_avg": ZERO, "exp_avg_sq": ZERO},
    "torch.RMSprop": {"step": WHOLE, "square_avg": ZERO, "momentum_buffer": ZERO, "grad_avg": ZERO},
    "torch.Rprop": {"step": WHOLE, "prev": ZERO, "step_size": Entry("rows", _setting("lr"))},
    "torch.SGD": {"momentum_buffer": MOMENTUM},
    "torch.SparseAdam": {"step": WHOLE, "exp_avg": ZERO, "exp_avg_sq": ZERO},
    "transformers.Adafactor": _ADAFACTOR,
    "bitsandbytes.Optimizer1State": _BITSANDBYTES,
    "bitsandbytes.Optimizer2State": _BITSANDBYTES,
    "bitsandbytes.AdEMAMix": _BITSANDBYTES | {"state1": Entry("stacked", _zeros)},
    "bitsandbytes.PytorchLARS": {"momentum_buffer": MOMENTUM},
    "torchao._AdamBase": _ADAM,
    "schedulefree.AdamWScheduleFree": _SCHEDULE_FREE,
    "schedulefree.AdamWScheduleFreeClosure": _SCHEDULE_FREE,
    "schedulefree.AdamWScheduleFreePaper": _SCHEDULE_FREE,
    "schedulefree.AdamWScheduleFreeReference": _SCHEDULE_FREE,
    "schedulefree.RAdamScheduleFree": _SCHEDULE_FREE,
    "schedulefree.RAdamScheduleFreeClosure": _SCHEDULE_FREE,
    "schedulefree.SGDScheduleFree": _SCHEDULE_FREE,
    "schedulefree.SGDScheduleFreeClosure": _SCHEDULE_FREE,
    "schedulefree.SGDScheduleFreeReference": _SCHEDULE_FREE,
    "lion_pytorch.Lion": {"exp_avg": ZERO},
    "prodigyopt.Prodigy": {
        "step": WHOLE,
        "s": Entry("flat", _zeros),
        "p0": Entry("flat", _themselves, is_weights=True),
        "exp_avg": ZERO,
        "exp_avg_sq": ZERO,
    },
    "came_pytorch.CAME": _ADAFACTOR | {"exp_avg_res_row": FACTOR, "exp_avg_res_col": FACTOR},
    "optimi.Adam": _OPTIMI,
    "optimi.StableAdamW": _OPTIMI,
    "optimi.Lion": _OPTIMI,
    # A parameter without a projection has Adam's state; a projection is a key that is not known.
    "galore_torch.AdamW": {"step": WHOLE, "exp_avg": ZERO, "exp_avg_sq": ZERO},
    "apollo_torch.AdamW": {"step": WHOLE, "seed": GIVEN, "exp_avg": ZERO, "exp_avg_sq": ZERO},
    # Slow weights around another optimizer.
    "pytorch_optimizer.Lookahead": {"slow_params": COPY, "backup_params": COPY, "slow_momentum": ZERO},
    "torch_optimizer.Lookahead": {"slow_param": COPY},
}


def kinds(optimizer: Any) -> tuple[str, ...]:
    """The optimizer's class and those that it inherits from, the nearest first, as "torch.AdamW"."""
    found: Any = type(optimizer)
    return _kinds_of(found)


# Asked for every parameter at every event.
@functools.lru_cache(maxsize=64)
def _kinds_of(found: type) -> tuple[str, ...]:
    return tuple(f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}" for cls in found.__mro__)


def is_a(optimizer: torch.optim.Optimizer, kind: str) -> bool:
    """Is it of the class ``kind``, such as "torch.AdamW", or of one that inherits from it?"""
    return kind in kinds(optimizer)


def known(optimizer: torch.optim.Optimizer) -> Mapping[str, Entry]:
    """What is known of the optimizer's state, by key."""
    return _known_of(kinds(optimizer))


@functools.lru_cache(maxsize=64)
def _known_of(kinds: tuple[str, ...]) -> Mapping[str, Entry]:
    entries: dict[str, Entry] = {}
    for kind in kinds:
        entries = _KNOWN.get(kind, {}) | entries
    return entries


def holder(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that has the state: ``optimizer``, or the one that ZeroRedundancyOptimizer made for the
    parameters of this process."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optim", optimizer)
    return inner if is_a(optimizer, "torch.ZeroRedundancyOptimizer") else optimizer


def adam_betas(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> tuple[float, float] | None:
    """Adam's betas, of the optimizers that correct the bias of their moments as Adam does, by the number of
    steps of the whole parameter."""
    if isinstance(holder(optimizer), torch.optim.Adam):
        beta1, beta2 = group["betas"]
        return float(beta1), float(beta2)
    # No first moment: schedule-free takes the average of the weights in its place.
    if any(is_a(optimizer, f"schedulefree.{name}") for name in _SCHEDULE_FREE_ADAM):
        return 0.0, float(group["betas"][1])
    return None


def steps_taken(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """Steps that the optimizer has taken already, by which it corrects its moments' bias."""
    if any(is_a(optimizer, f"schedulefree.{name}") for name in _SCHEDULE_FREE_ADAM):
        return int(optimizer.param_groups[0].get("k", 0))
    return int(holder(optimizer).state.get(parameter, {}).get("step", 0))


def counted_start(
    optimizer: torch.optim.Optimizer, parameter: Tensor, group: Mapping[str, Any], steps: int
) -> dict[str, Tensor]:
    """The state of a parameter that torch's Adam, or AdamW, has no moments of, after ``steps`` steps; of
    other optimizers none, which they make in their next step."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return {}
    # As torch.optim.Adam makes it: a number where its kernels read it.
    on_device = group["capturable"] or group["fused"]
    step = torch.tensor(float(steps), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    moments = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    return {"step": step} | {moment: torch.zeros_like(parameter) for moment in moments}


def weights_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """Further weights that a step moves along with the parameter (schedule-free's z)."""
    if not any(kind.startswith("schedulefree.") for kind in kinds(optimizer)):
        return []
    state = optimizer.state.get(parameter, {})
    further = [value for key, value in state.items() if key in _SCHEDULE_FREE and _SCHEDULE_FREE[key] is COPY]
    return [value for value in further if value.device == parameter.device]


def outgrown(optimizer: torch.optim.Optimizer, parameter: Tensor) -> str | None:
    """Would the optimizer keep the parameter's state in another form if it made it now? Then, why.

    Those that quantise leave small parameters as they are, and look at the size but once.
    """
    if is_a(optimizer, "bitsandbytes.Optimizer8bit"):
        return _outgrown_bitsandbytes(optimizer, parameter)
    if is_a(optimizer, "torchao._AdamBase"):
        made = optimizer._new_buffer(parameter.detach(), True)  # type: ignore[attr-defined]
        if type(made) is not Tensor:
            return f"at this size the optimizer keeps it as {type(made).__name__}"
    return None


def _outgrown_bitsandbytes(optimizer: Any, parameter: Tensor) -> str | None:
    dtype = optimizer.state[parameter]["state1"].dtype
    for i, group in enumerate(optimizer.param_groups):
        for k, other in enumerate(group["params"]):
            if other is parameter:
                config = optimizer.get_config(i, k, group)
                least = config["min_8bit_size"]
                if config["optim_bits"] == 8 and dtype != torch.uint8 and parameter.numel() >= least:
                    return f"from {least} numbers on the optimizer keeps it in 8 bits"
    # bitsandbytes.optim.Optimizer8bit.get_state_buffer
    if optimizer.is_paged and parameter.is_cuda and parameter.numel() >= 1e5:
        return "from 100000 numbers on the optimizer keeps it in paged memory"
    return None
