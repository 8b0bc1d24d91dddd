"""What a model has to be for an adapter of a configuration, looked at before anything is changed."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..contract.config import MethodConfig
from ..layers import AdaptedLayer
from ..support.experts import Parameter, is_router, names_one_of
from ..support.warning import warn

try:
    from peft.tuners.lora.model import get_tp_plan_and_mesh
except ImportError:  # PEFT 0.21.0 knows the other mark of a base that is split, and has no such function.
    get_tp_plan_and_mesh = None


def check_not_split(base: nn.Module, model: nn.Module, name: str) -> None:
    """Raises ValueError where tensor parallelism has split the weight of ``base``."""
    plan = getattr(base, "_hf_tp_plan", None)
    if plan is None and get_tp_plan_and_mesh is not None:
        plan, _ = get_tp_plan_and_mesh(model, name)
    if plan is not None:
        raise ValueError(
            f"its weight is split over processes (tensor parallel, {plan!r}), and so would its adapter have "
            "to be, which cannot grow; load the base model without tp_plan and use DDP."
        )


def check_no_lora(model: nn.Module) -> None:
    """Raises ValueError where the model has adapters of PEFT's LoRA."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, AdaptedLayer):
            raise ValueError(
                f"the model has a plain LoRA already, at {name!r}; what is saved of both would not load. "
                "Call merge_and_unload() on it first, or convert it by increlora_rs.convert_lora and load it "
                "as a second adapter."
            )


def check_not_trained_as_a_whole(config: MethodConfig, name: str) -> None:
    """Raises where PEFT would wrap a module that holds the adapted one: it takes the end of any name."""
    parts = name.split(".")
    around = [".".join(parts[: k + 1]) for k in range(len(parts))]
    for saved in config.modules_to_save or ():
        for module in around:
            if module.endswith(saved):
                raise ValueError(
                    f"modules_to_save: {saved!r} is the end of {module!r} too, in which {name!r} is adapted, "
                    "and what is trained as a whole cannot be; give more of the name, or name the adapted "
                    "one in exclude_modules."
                )


def leave_out_routers(model: nn.Module, config: MethodConfig, out: list[Parameter]) -> None:
    """Excludes, so that a saved adapter excludes them too, the routers that "all-linear" would take."""
    routers = [parameter.module for parameter in out if is_router(model.get_submodule(parameter.module))]
    given = config.exclude_modules
    if routers and isinstance(given, str):
        config.exclude_modules = "|".join([f"(?:{given})", *map(re.escape, routers)])
    elif routers:
        config.exclude_modules = [*(given or ()), *routers]


def check_targets(model: nn.Module, targets: Any, experts: list[Parameter]) -> None:
    """Raises ValueError where no name in ``target_modules`` is one of the model's; warns of single ones."""
    names = [name for name, _ in model.named_modules()]
    unknown = sorted(
        target
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in names)
    )
    if len(unknown) < len(targets):
        # Of experts there is a warning of its own.
        unknown = [target for target in unknown if not names_one_of(experts, target, model)]
    if unknown and len(unknown) < len(targets):
        warn(f"target_modules: {unknown} match no module of the base model; the other names do.")
    elif unknown:
        linear = {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
        fused = "".join(f", only fused experts, {first.full_name!r} the first" for first in experts[:1])
        raise ValueError(
            f"target_modules: {unknown} match no module of the base model{fused}; its linear layers are "
            f"called {sorted(linear)}."
        )
