"""What `attach` looks at before it attaches: which optimizer, which adapter, and whether they fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .adapted import AdaptedModule
from .distributed import refuse_sharded
from .layers import AdaptedLayer


def unwrapped_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer in ``optimizer``, which may be an AcceleratedOptimizer.

    Raises:
        TypeError: there is none.
        ValueError: it is DeepSpeed's.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if type(optimizer).__module__.startswith(("deepspeed.", "accelerate.utils.deepspeed")):
        raise ValueError(
            f"optimizer: a {type(optimizer).__name__} of DeepSpeed keeps flat copies of the parameters, "
            "which cannot grow. Use DDP: leave out `deepspeed` in TrainingArguments."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: a {type(optimizer).__name__} is not a torch.optim.Optimizer; give the optimizer "
            "that trains the adapter."
        )
    return optimizer


def trainable_adapter(model: nn.Module, wanted: str | None) -> str:
    """Name of the one trainable IncreLoRA adapter of ``model``, or ``wanted`` if it is one.

    Raises:
        ValueError: there is none, or there are several.
    """
    trainable: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            trainable.update({name: None for name in module.lora_A if module.factors(name)[0].requires_grad})
    if wanted is not None:
        if wanted not in trainable:
            raise ValueError(
                f"adapter_name={wanted!r} is no trainable IncreLoRA adapter of the model; trainable are "
                f"{list(trainable)}."
            )
        return wanted
    if len(trainable) != 1:
        raise ValueError(
            f"model: it has {len(trainable)} trainable IncreLoRA adapters {list(trainable)}; ranks grow in "
            "exactly one: make it with get_peft_model(model, IncreLoraConfig(...)), load it with "
            "is_trainable=True, or name it by adapter_name."
        )
    return next(iter(trainable))


def schedulers_of(model: nn.Module) -> list[Any]:
    """The schedulers that are attached to adapters of ``model``."""
    probes = [
        p for module in model.modules() if isinstance(module, AdaptedLayer) for p in module.probes.values()
    ]
    return list({id(p.scheduler): p.scheduler for p in probes if p.attached}.values())


def check_attachable(modules: Sequence[AdaptedModule], optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError unless the adapter can be trained by ``optimizer`` and can grow."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer: LBFGS keeps one flat vector over all parameters, which cannot grow; use AdamW or "
            "another optimizer that keeps its state by parameter."
        )
    first = modules[0]
    if first.layer.probes[first.adapter].attached:
        raise ValueError(
            "model: a scheduler is attached to this adapter already; call its detach() first, and use "
            "either attach() or IncreLoraCallback."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module in modules:
        config = module.layer.configs[module.adapter]
        configured = config.scale(module.layer.lora_alpha[module.adapter], module.rank)
        if not math.isclose(module.layer.scaling[module.adapter], configured, rel_tol=1e-6):
            raise ValueError(
                f"model: {module.name!r} has the scale {module.layer.scaling[module.adapter]:g}, but r="
                f"{config.r} and its lora_alpha make {configured:g}, which a saved adapter would be loaded "
                "with. To go on with another r, load it with PeftModel.from_pretrained(..., config="
                "IncreLoraConfig(r=..., lora_alpha=..., ...)) and scale lora_alpha along."
            )
        if module.adapter in module.layer.merged_adapters:
            raise ValueError(
                f"model: adapter {module.adapter!r} is merged into the base weights; call "
                "unmerge_adapter() before training."
            )
        for parameter, _, _ in module.parameters:
            refuse_sharded(parameter)
            if id(parameter) not in held:
                raise ValueError(
                    f"optimizer: it does not hold the adapter's parameters of {module.name!r}; make it "
                    "from the parameters of the model that get_peft_model returned, after that call."
                )
