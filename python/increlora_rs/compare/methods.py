"""The methods that are compared: what each makes of a budget, and how it is varied.

``increlora:orth_reg_weight=0.1,restart_warmup=false`` is a method with options of its configuration
replaced. One more option is the comparison's own: ``e_lr=10`` (E is trained at ten times the learning rate).
A method of ours goes by its name: all that it has of the setting is r, alpha, dropout and targets. ``all``
stands for plain LoRA and all of ours.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import AdaLoraConfig, LoraConfig, PeftConfig, TaskType
from transformers import TrainerCallback

from ..contract.config import MethodConfig
from ..methods import METHODS
from ..methods.increlora.config import IncreLoraConfig
from ..support.names import rank_pattern
from ..training.callback import IncreLoraCallback
from .callbacks import AdaLoraCallback, RandomGrowthCallback

#: What stands for LoRA and all methods of ours.
ALL = "all"
# Whose final ranks the methods of given ranks start with.
SOURCE = "increlora"
#: E's name among the parameters, of a method of ours and in PEFT's AdaLoRA.
E = "lora_E"
_E_LR = "e_lr"
_BY_MODULE = {"rank_pattern", "alpha_pattern", "module_sizes", "module_names"}


@dataclass(frozen=True)
class Setting:
    """What a configuration is made from.

    Args:
        r: Average rank that every method ends with; for methods that allocate it may be no whole number.
        total_steps: Optimizer steps.
        seed: Of the run.
        shared: Arguments that all configurations take: alpha, dropout, target modules.
        given: Rank by full module name, for the methods that start with another run's.
        sized: Options that give a method the size that it is to have; those of the method come before them.
    """

    r: float
    total_steps: int
    seed: int
    shared: dict[str, Any]
    given: dict[str, int] = field(default_factory=dict)
    sized: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A method ready for a training: its configuration, callbacks, and E's learning rate as a multiple."""

    config: PeftConfig
    callbacks: list[TrainerCallback]
    e_lr: float


@dataclass(frozen=True)
class Method:
    """One method with its options.

    Args:
        name: One of :func:`names`.
        options: What is replaced, by option.
    """

    name: str
    options: dict[str, Any]

    def __str__(self) -> str:
        options = ",".join(f"{name}={_text(value)}" for name, value in sorted(self.options.items()))
        return f"{self.name}:{options}" if options else self.name

    @property
    def wants_ranks(self) -> bool:
        """Does it start with the final ranks of a run of ``increlora``?"""
        return self.name.endswith("-given")

    def prepare(self, setting: Setting) -> Prepared:
        """Configuration and callbacks for a training.

        Raises:
            ValueError, TypeError: an option is unknown to the method, or its value wrong.
        """
        config = _FORMS[self.name](setting, **setting.sized)
        replaced = {name: value for name, value in self.options.items() if name != _E_LR}
        known = {option.name for option in dataclasses.fields(config) if option.init} - {"peft_type"}
        for name in replaced:
            if name not in known:
                raise ValueError(
                    f"--methods {self}: {name!r} is neither an option of {type(config).__name__} nor {_E_LR}."
                )
        return Prepared(
            _FORMS[self.name](setting, **(setting.sized | replaced)),
            self._callbacks(config, setting),
            self._e_lr(config),
        )

    def resolved(self, setting: Setting) -> dict[str, Any]:
        """The options of the configuration that are its class's own, defaults included: a default that a
        later release changes makes another run. Without the patterns by module, and what gives it its
        size: that stands beside them in a run's configuration."""
        own = own_options(self.prepare(setting).config)
        return {name: value for name, value in own.items() if name not in {"r", *setting.sized}}

    def sized(self, r: int) -> list[dict[str, Any]]:
        """The options that make it larger or smaller, at rank ``r``, but for those of its own: one choice, or
        several from small to large. None of a method of PEFT, which has the setting's rank."""
        config = _CONFIGS.get(self.name)
        choices = [{}] if config is None else [{"r": r} | beside for beside in config.options_beside_r()]
        return [
            {name: value for name, value in choice.items() if name not in self.options} for choice in choices
        ]

    def _callbacks(self, config: PeftConfig, setting: Setting) -> list[TrainerCallback]:
        if isinstance(config, AdaLoraConfig):
            return [AdaLoraCallback()]
        if self.name.endswith("-random"):
            return [RandomGrowthCallback(setting.seed)]
        return [IncreLoraCallback()] if _changes_in_training(config) else []

    def _e_lr(self, config: PeftConfig) -> float:
        factor = self.options.get(_E_LR, 1.0)
        if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not factor > 0:
            raise ValueError(f"--methods {self}: e_lr={factor!r} must be a number above 0.")
        if factor != 1.0 and not _has_e(config):
            raise ValueError(f"--methods {self}: e_lr is for methods that have an E.")
        return float(factor)


def own_options(config: PeftConfig) -> dict[str, Any]:
    """The options of a configuration that are its class's own, defaults included, but for those that say
    that they change no result: with them a run is the run of before. Of LoRA none."""
    if type(config) is LoraConfig:
        return {}
    annotated = vars(type(config))["__annotations__"]
    own = {
        option.name
        for option in dataclasses.fields(config)
        if option.name in annotated and option.metadata.get("changes_result", True)
    }
    values = {name: getattr(config, name) for name in sorted(own - _BY_MODULE)}
    return values | config.resolved() if isinstance(config, MethodConfig) else values


def _changes_in_training(config: PeftConfig) -> bool:
    return isinstance(config, MethodConfig) and config.policy is not None


def _has_e(config: PeftConfig) -> bool:
    if isinstance(config, MethodConfig):
        return E in config.method.structure.names
    return isinstance(config, AdaLoraConfig)


def names() -> list[str]:
    """The methods that there are."""
    return list(_FORMS)


def parse_methods(text: str, known: Sequence[str] | None = None, option: str = "--methods") -> list[Method]:
    """The methods of ``lora,increlora:beta1=0.9,top_h=4,adalora``: a piece with "=" alone goes on with
    the method before it, and the piece "all" stands for LoRA and all methods of ours.

    Args:
        known: Names that there are; None: those of :func:`names`.
        option: The option that ``text`` was given to, for messages.

    Raises:
        ValueError: a method is unknown, there twice, or there is none.
    """
    every = ["lora", *(method.name for method in METHODS)] if known is None else [ALL]
    known = names() if known is None else known
    pieces: list[list[str]] = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        if "=" in piece and ":" not in piece and pieces:
            pieces[-1].append(piece)
        elif piece == ALL:
            pieces += [[name] for name in every]
        else:
            pieces.append(piece.split(":", 1))
    methods = [_parse(name.strip(), options, known, option) for name, *options in pieces]
    shown = [str(method) for method in methods]
    if not methods or len(set(shown)) < len(shown):
        raise ValueError(f"{option} {text!r}: give one or more, each once, of {', '.join(known)}.")
    return methods


def has_all(text: str) -> bool:
    """Has ``text``, as for :func:`parse_methods`, the piece "all"?"""
    return ALL in [piece.strip() for piece in text.split(",")]


def _parse(name: str, pairs: list[str], known: Sequence[str], option: str) -> Method:
    if name not in known:
        raise ValueError(f"{option}: {name!r} is unknown; there are {', '.join(known)}.")
    parsed = {}
    for pair in pairs:
        key, sign, value = (part.strip() for part in pair.partition("="))
        if not key or not sign or not value:
            raise ValueError(f"{option} {name}: {pair!r} is no option; write name=value.")
        parsed[key] = _value(value)
    return Method(name, parsed)


def _value(text: str) -> Any:
    """JSON, or the text itself where it is none; None as Python writes it."""
    text = {"None": "null", "True": "true", "False": "false"}.get(text, text)
    try:
        return json.loads(text)
    except ValueError:
        return text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# The forms. Every one ends with r components a module on average, or is given the rank r: how many parameters
# that makes is the method's own, and stands in the table.


def _ours(config: type[MethodConfig]) -> Callable[..., PeftConfig]:
    # A method whose scale is its own has no alpha by default, and LoRA's would be another method.
    own = {option.name for option in dataclasses.fields(config) if option.default is None} & {"lora_alpha"}

    def form(setting: Setting, **options: Any) -> PeftConfig:
        shared = {name: value for name, value in setting.shared.items() if name not in own}
        return config(**({"task_type": TaskType.SEQ_CLS, "r": setting.r} | shared | options))

    return form


def _whole(setting: Setting) -> int:
    """The rank of a method that has no other than whole ones.

    Raises:
        ValueError: it is none.
    """
    if not float(setting.r).is_integer():
        raise ValueError(
            f"--r {setting.r}: PEFT's methods have whole ranks only; leave them out of --methods, or give a "
            "whole r."
        )
    return int(setting.r)


def _lora(setting: Setting, **options: Any) -> PeftConfig:
    return LoraConfig(**({"task_type": TaskType.SEQ_CLS, "r": _whole(setting)} | setting.shared | options))


def _rslora(setting: Setting, **options: Any) -> PeftConfig:
    return _lora(setting, **({"use_rslora": True} | options))


def _adalora(setting: Setting, **options: Any) -> PeftConfig:
    # As its authors do on GLUE: half as much again to start with, pruned from some 15 % of the steps
    # until half of them are left; the mask changes 500 times at most.
    total = setting.total_steps
    values = {
        "task_type": TaskType.SEQ_CLS,
        "init_r": math.ceil(1.5 * setting.r),
        "target_r": _whole(setting),
        "total_step": total,
        "tinit": round(0.15 * total),
        "tfinal": max(1, round(0.5 * total)),
        "deltaT": max(1, total // 500),
        "orth_reg_weight": 0.1,
    }
    return AdaLoraConfig(**(values | setting.shared | options))


_increlora = _ours(IncreLoraConfig)


def _grown(setting: Setting, **options: Any) -> PeftConfig:
    return _increlora(setting, **({"importance": "gradient"} | options))


def _paper(setting: Setting, **options: Any) -> PeftConfig:
    values = {"task_type": TaskType.SEQ_CLS, "r": setting.r} | setting.shared
    return IncreLoraConfig.paper(**(values | options))


def _increlora_given(setting: Setting, **options: Any) -> PeftConfig:
    # At its budget from the start, ranks that grow stay as they are.
    return _grown(setting, **({"rank_pattern": rank_pattern(setting.given)} | options))


def _lora_given(setting: Setting, **options: Any) -> PeftConfig:
    # Alpha by module, so that every module has the scale alpha / r, as it has in IncreLoRA's default form.
    alpha = setting.shared["lora_alpha"] / setting.r
    ranks = rank_pattern({name: rank for name, rank in setting.given.items() if rank})
    values: dict[str, Any] = {
        "rank_pattern": ranks,
        "alpha_pattern": {name: alpha * rank for name, rank in ranks.items()},
        # LoRA knows no rank 0.
        "exclude_modules": [name for name, rank in setting.given.items() if not rank] or None,
    }
    return _lora(setting, **(values | options))


# Of those whose size can be chosen.
_CONFIGS: dict[str, type[MethodConfig]] = {
    **{method.name: method.config for method in METHODS},
    "paper": IncreLoraConfig,
    "increlora-random": IncreLoraConfig,
    "increlora-given": IncreLoraConfig,
}
_FORMS: dict[str, Callable[..., PeftConfig]] = {
    "lora": _lora,
    "rslora": _rslora,
    "adalora": _adalora,
    **{method.name: _ours(method.config) for method in METHODS},
    "paper": _paper,
    "increlora-random": _grown,
    "increlora-given": _increlora_given,
    "lora-given": _lora_given,
}
