"""The arms of a comparison: what each makes of a budget. LoRA of given ranks, or a method of ours.

All arms scale their update by alpha / r with the budget's r. An arm takes options of its configuration, as
in ``increlora:growth_end=0.6``, and three of the bed's own: ``a_lr``, ``b_lr`` and ``e_lr`` multiply the
learning rate of that factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from increlora_rs import IncreLoraConfig
from increlora_rs.compare.methods import Method, own_options
from increlora_rs.methods.increlora.growth import Growth
from increlora_rs.support.names import rank_pattern
from peft import LoraConfig, PeftConfig

from . import ranks as allot
from .ranks import Ranks, Sizes

#: The arm that all others are compared with.
REFERENCE = "lora"
CEILING = "ceiling"
#: A large LoRA, trained to find the ceiling's ranks where they are not known.
SOURCE = "ceiling-source"
OVER_ALL = "shuffled"
SHUFFLED = ("shuffled-families", OVER_ALL)
#: Factors whose learning rate is multiplied, by option.
RATES = {"a_lr": "lora_A", "b_lr": "lora_B", "e_lr": "lora_E"}
_OURS: dict[str, dict[str, Any]] = {
    "increlora": {},
    "sensitivity": {"importance": "sensitivity", "growth_end": 0.6},
    "lot": {"importance": "gradient", "growth_end": 0.6},
}
#: The option of the shuffled arms that says whose final ranks they take.
OF = "of"
# A module, where only the options of a configuration are wanted.
_ANY = "module"


@dataclass(frozen=True)
class Setting:
    """What an arm is made from.

    Args:
        r: The budget: parameters of rank r in all modules.
        alpha: ``lora_alpha``.
        sizes: (out, in) by module.
        seed: Of the run.
        given: Ranks by module, for the arms that are told theirs.
    """

    r: float
    alpha: float
    sizes: Sizes
    seed: int
    given: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """An arm ready for a training.

    Args:
        config: Its configuration.
        policy: What decides in the place of the method's own policy, for ``attach``; None: its own.
        rates: Multiples of the learning rate, by factor.
    """

    config: PeftConfig
    policy: Callable[..., Any] | None
    rates: dict[str, float]


def names() -> list[str]:
    """The arms that there are."""
    return [name for name in (*_LORA, *_OURS) if name != SOURCE]


def is_told(arm: Method) -> bool:
    """Does the arm get its ranks from another run?"""
    return arm.name in (CEILING, *SHUFFLED)


def is_possible(arm: Method, r: float) -> bool:
    """LoRA in all modules has no rank below 1, nor between whole ones; nor has another's share of them."""
    return arm.name != REFERENCE or float(r).is_integer()


def teller_of(arm: Method, arms: Sequence[Method]) -> Method:
    """The arm whose final ranks a shuffled one takes: the first of the name that its option ``of`` gives,
    else the first of ours.

    Raises:
        ValueError: there is none.
    """
    name = arm.options.get(OF)
    found = next((a for a in arms if a.name == name or (name is None and a.name in _OURS)), None)
    if found is None or found.name not in _OURS:
        raise ValueError(f"--arms {arm}: name an arm whose ranks it takes, too, of {', '.join(_OURS)}.")
    return found


def resolved(arm: Method, r: float, alpha: float) -> dict[str, Any]:
    """The options of an arm's configuration that are its class's own, defaults included.

    Raises:
        ValueError, TypeError: an option is unknown to it, or its value wrong.
    """
    if arm.name in _OURS:
        return own_options(prepare(arm, Setting(r, alpha, {_ANY: (1, 1)}, 0)).config)
    options, _ = _split(arm)
    LoraConfig(**options)
    return {}


def prepare(arm: Method, setting: Setting) -> Prepared:
    """Configuration, policy and learning rates of an arm.

    Raises:
        ValueError, TypeError: an option is unknown, or its value wrong.
    """
    options, rates = _split(arm)
    if arm.name in _OURS:
        policy = partial(Growth, choose_by=_by_lot(setting.seed)) if arm.name == "lot" else None
        return Prepared(_ours(setting, _OURS[arm.name] | options), policy, rates)
    return Prepared(_lora(setting, _LORA[arm.name](setting), options), None, rates)


def _split(arm: Method) -> tuple[dict[str, Any], dict[str, float]]:
    """The options of the configuration, and the multiples of learning rates by factor."""
    options = {name: value for name, value in arm.options.items() if name not in (*RATES, OF)}
    return options, {
        factor: float(arm.options[name]) for name, factor in RATES.items() if name in arm.options
    }


def _ours(setting: Setting, options: dict[str, Any]) -> PeftConfig:
    r = int(setting.r) if float(setting.r).is_integer() else setting.r
    shared = {"r": r, "lora_alpha": setting.alpha, "target_modules": list(setting.sizes)}
    return IncreLoraConfig(**(shared | options))


def _lora(setting: Setting, ranks: Ranks, options: dict[str, Any]) -> PeftConfig:
    adapted = {name: rank for name, rank in ranks.items() if rank > 0}
    pattern = rank_pattern(adapted)
    # Alpha by module, so that every module has the scale alpha / r of the budget.
    alphas = {name: setting.alpha / setting.r * rank for name, rank in pattern.items()}
    values = {"r": 1, "target_modules": list(adapted), "rank_pattern": pattern, "alpha_pattern": alphas}
    return LoraConfig(**(values | options))


def _uniform(setting: Setting) -> Ranks:
    return dict.fromkeys(setting.sizes, int(setting.r))


def _filled(choose: Callable[[Sizes], list[str]]) -> Callable[[Setting], Ranks]:
    return lambda setting: allot.fill(
        setting.sizes, choose(setting.sizes), allot.budget(setting.sizes, setting.r)
    )


def _given(setting: Setting) -> Ranks:
    return dict(setting.given)


_LORA: dict[str, Callable[[Setting], Ranks]] = {
    REFERENCE: _uniform,
    "lora-qv": _filled(allot.query_and_value),
    "lora-mlp": _filled(allot.mlp),
    CEILING: _given,
    SOURCE: _uniform,
    **dict.fromkeys(SHUFFLED, _given),
}


def _by_lot(seed: int) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    lots = np.random.default_rng(seed)
    # 0 would count as a module without any importance.
    return lambda scores: lots.uniform(0.1, 1.0, len(scores))
