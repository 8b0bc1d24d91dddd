"""What `attach` looks at before it attaches: which optimizer, which adapter, and whether they fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..layers import AdaptedLayer
from ..layers.found import all_adapted_layers
from ..ops.probe import Probe
from ..resizing.optimizer_starts import is_a, kinds
from ..resizing.optimizer_state import note_wrapper
from . import deepspeed
from .modules import AdaptedModule
from .sharding import refuse_sharded

# Optimizers that cannot train what grows, by top package and class, with the reason and the way out.
_IN_BACKWARD = (
    "it takes its steps within the backward pass, and ranks grow between steps; use AdamW or another "
    "optimizer with a step() of its own (of TrainingArguments' `optim`, one without _layerwise)."
)
_SWAPS = (
    "it swaps weights with its optimizer's state around each step; use schedulefree.AdamWScheduleFree or "
    "another of schedulefree's own optimizers."
)
_REFUSED = {
    "torch.LBFGS": "it keeps one flat vector over all parameters, which cannot grow; use AdamW or another "
    "optimizer that keeps its state by parameter.",
    "torch.PostLocalSGDOptimizer": "between its averagings the processes have different parameters, and "
    "growth needs the same in all; use DistributedDataParallel with the optimizer inside of it.",
    "torchao.CPUOffloadOptimizer": "it keeps copies of the parameters, which cannot grow; the state of an "
    "adapter is small: use AdamW.",
    "lomo_optim.Lomo": _IN_BACKWARD,
    "lomo_optim.AdaLomo": _IN_BACKWARD,
    "transformers.LayerWiseDummyOptimizer": _IN_BACKWARD,
    "schedulefree.ScheduleFreeWrapper": _SWAPS,
    "schedulefree.ScheduleFreeWrapperReference": _SWAPS,
}


def unwrapped_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer in ``optimizer`` whose step() changes the parameters: in an AcceleratedOptimizer, a
    Lookahead, the one inside.

    Raises:
        TypeError: there is none.
        ValueError: it is one that cannot train what grows.
    """
    _refuse(optimizer)
    while (inner := _inner(optimizer)) is not None:
        note_wrapper(inner, optimizer)
        optimizer = inner
        _refuse(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: a {type(optimizer).__name__} is not a torch.optim.Optimizer; give the optimizer "
            "that trains the adapter."
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(
            f"optimizer: a {type(optimizer).__name__} does not call torch.optim.Optimizer's __init__, so its "
            "steps cannot be followed; give the optimizer inside of it, whose step() changes the parameters."
        )
    return optimizer


def _inner(optimizer: Any) -> torch.optim.Optimizer | None:
    # Its inner optimizer has the parameters of one process alone.
    if isinstance(optimizer, torch.optim.Optimizer) and is_a(optimizer, "torch.ZeroRedundancyOptimizer"):
        return None
    for name in ("optimizer", "_optimizer", "base_optimizer"):
        inner = getattr(optimizer, name, None)
        if isinstance(inner, torch.optim.Optimizer):
            return inner
    return None


def _refuse(optimizer: Any) -> None:
    for kind in kinds(optimizer):
        if kind in _REFUSED:
            name = kind.partition(".")[2]
            raise ValueError(f"optimizer: a {name} cannot train an adapter that grows: {_REFUSED[kind]}")
    for option in ("parameters_as_bucket_view", "_overlap_with_ddp"):
        if "torch.ZeroRedundancyOptimizer" in kinds(optimizer) and getattr(optimizer, option, False):
            raise ValueError(
                f"optimizer: a ZeroRedundancyOptimizer with {option.removeprefix('_')}=True lays the "
                "parameters into buckets of a fixed size, in which they cannot grow; leave that option out."
            )


def trainable_adapter(model: nn.Module, wanted: str | None) -> str:
    """Name of the one trainable adapter of ``model``, or ``wanted`` if it is one.

    Raises:
        ValueError: there is none, or there are several.
    """
    trainable: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            adapters = (AdaptedModule("", module, name) for name in module.adapters)
            trainable.update({one.adapter: None for one in adapters if any(_trained(one))})
    if wanted is not None:
        if wanted not in trainable:
            raise ValueError(
                f"adapter_name={wanted!r} is no trainable adapter of the model; trainable are "
                f"{list(trainable)}."
            )
        return wanted
    if len(trainable) != 1:
        raise ValueError(
            f"model: it has {len(trainable)} trainable adapters of increlora_rs {list(trainable)}; a "
            "scheduler is for one: make it with get_peft_model(model, IncreLoraConfig(...)), load it with "
            "is_trainable=True, or name it by adapter_name."
        )
    return next(iter(trainable))


def _trained(module: AdaptedModule) -> list[bool]:
    return [parameter.requires_grad for parameter, _, _ in module.parameters]


def _names(module: AdaptedModule, parameters: Sequence[Tensor]) -> list[str]:
    names = {id(parameter): name for name, parameter in module.layer.named_parameters()}
    return [f"{module.name}.{names[id(parameter)]}" for parameter in parameters]


def _refuse_frozen(modules: Sequence[AdaptedModule], optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where some factors of a module are frozen; one that is frozen whole is left alone."""
    frozen: list[str] = []
    for module in modules:
        trained = _trained(module)
        if any(trained):
            still = [
                p for (p, _, _), is_trained in zip(module.parameters, trained, strict=True) if not is_trained
            ]
            frozen += _names(module, still)
    if frozen:
        more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
        raise ValueError(
            f"model: {', '.join(frozen[:3])}{more}: frozen (requires_grad=False), while other factors of the "
            "same modules are trained. Such an adapter cannot grow, for all factors of a new component are "
            "trained together. Call requires_grad_(True) on them and make the optimizer then; one of "
            "peft.optimizers.create_lorafa_optimizer freezes A: use AdamW or create_loraplus_optimizer."
        )
    if is_a(optimizer, "peft.LoraFAOptimizer"):
        raise ValueError(
            "optimizer: a LoraFAOptimizer trains B alone and leaves A as it is, and such an adapter cannot "
            "grow; use AdamW or peft.optimizers.create_loraplus_optimizer."
        )


def _refuse_computed_or_shared(modules: Sequence[AdaptedModule]) -> None:
    """Raises ValueError where a factor is no parameter of its module alone."""
    owners: dict[int, str] = {}
    for module in modules:
        for factor, parameter in zip(module.structure.names, module.trained, strict=True):
            if not isinstance(parameter, nn.Parameter):
                raise ValueError(
                    f"model: {factor} of {module.name!r} is computed, as by torch.nn.utils.parametrize, "
                    "weight_norm or spectral_norm, and what is computed cannot grow; take that off before "
                    "attach, or put it on the base layer."
                )
            if module.structure.shared:
                continue
            owner = owners.setdefault(id(parameter), module.name)
            if owner != module.name:
                raise ValueError(
                    f"model: {owner!r} and {module.name!r} share one parameter, {factor}, and modules "
                    "grow each by itself; give each a parameter of its own."
                )


def held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of the parameters that ``optimizer`` holds."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


# The attached schedulers, each with the probe of its adapter, which knows only that there is one. Weak: a
# scheduler goes with its model and optimizer.
ATTACHED: WeakKeyDictionary[Any, Probe] = WeakKeyDictionary()


def schedulers_of(model: nn.Module) -> list[Any]:
    """The schedulers that are attached to adapters of ``model``."""
    probes = dict.fromkeys(probe for layer in all_adapted_layers(model) for probe in layer.probes.values())
    schedulers = {probe: scheduler for scheduler, probe in ATTACHED.items()}
    return [schedulers[probe] for probe in probes if probe in schedulers]


def check_attachable(
    modules: Sequence[AdaptedModule], optimizer: torch.optim.Optimizer, zero: Any | None = None
) -> None:
    """Raises ValueError unless the adapter can be trained by ``optimizer`` and can grow; ``zero``: the
    optimizer of DeepSpeed's around it, if there is one."""
    first = modules[0]
    if first.layer.probes[first.adapter].attached:
        raise ValueError(
            "model: a scheduler is attached to this adapter already; call its detach() first, and use "
            "either attach() or IncreLoraCallback."
        )
    _refuse_computed_or_shared(modules)
    _refuse_frozen(modules, optimizer)
    held = held_by(optimizer) if zero is None else deepspeed.held(zero)
    for module in modules:
        config = module.layer.configs[module.adapter]
        configured = config.scale(module.layer.lora_alpha[module.adapter], module.rank)
        if not math.isclose(module.layer.scaling[module.adapter], configured, rel_tol=1e-6):
            raise ValueError(
                f"model: {module.name!r} has the scale {module.layer.scaling[module.adapter]:g}, but r="
                f"{config.r} and its lora_alpha make {configured:g}, which a saved adapter would be loaded "
                "with. To go on with another r, load it with PeftModel.from_pretrained(..., config="
                f"{type(config).__name__}(r=..., lora_alpha=..., ...)) and scale lora_alpha along."
            )
        if module.adapter in module.layer.merged_adapters:
            raise ValueError(
                f"model: adapter {module.adapter!r} is merged into the base weights; call "
                "unmerge_adapter() before training."
            )
        parameters = [parameter for parameter, _, _ in module.parameters]
        for parameter in parameters:
            has_room = module.layer.has_room(module.adapter)
            refuse_sharded(parameter, has_room=has_room, by_zero=zero is not None)
        missing = [parameter for parameter in parameters if id(parameter) not in held]
        if missing:
            raise ValueError(
                f"optimizer: it does not hold the adapter's parameters of {module.name!r} "
                f"({', '.join(_names(module, missing))}); make it from the parameters of the model that "
                "get_peft_model returned, after that call."
            )
