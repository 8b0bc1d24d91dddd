"""A trained plain LoRA as an IncreLoRA adapter of the same function, to go on growing from."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ...contract.config import changed_options
from ...saved.lora_format import dora_tensor
from ...saved.reading import SavedAdapter, SavedModule, layers_of_parameters, read_lora
from ...support import arguments
from ...support.experts import expert_layers, expert_layers_of_base
from ...support.files import refuse_own_directory, staged
from ...support.lowrank import Svd, svd_of_product
from ...support.names import rank_pattern
from ...support.sites import module_kinds
from ...support.warning import warn
from .config import IncreLoraConfig

# What an adapter is on; how it learns is the caller's choice.
_OF_THE_BASE = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "bias",
    "fan_in_fan_out",
    "use_dora",
)
# Options of LoraConfig whose work is done once the LoRA is trained, and those that are read here.
_DONE = {
    "peft_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "eva_config",
}
# Initialisations that leave the base model's weights as they are.
_INITS = (True, False, "gaussian", "orthogonal", "eva")


def convert_lora(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    r: int | None = None,
    *,
    adapter_name: str = "default",
    **options: Any,
) -> IncreLoraConfig:
    """Writes a trained LoRA or DoRA to ``out_dir`` as an IncreLoRA adapter that gives the same outputs.

    Each update ``scale B A`` becomes its singular value decomposition: the columns of B and the rows of A
    orthonormal, the singular values, over the scale, in E. Its rank is the number of singular values that
    are not rounding, so zero padding does not count. ``PeftModel.from_pretrained(base, out_dir,
    is_trainable=True)`` and ``attach`` go on from there.

    Args:
        model_or_adapter_dir: A model with a LoRA adapter, or a directory that ``save_pretrained`` wrote;
            the base model is not needed.
        out_dir: Where to write ``adapter_config.json`` and ``adapter_model.safetensors``.
        r: The budget, the average rank to grow to; None: the average rank now, rounded up, over parameters
            with ``budget_unit="parameters"``.
        adapter_name: Which adapter of a model.
        options: Further arguments of ``IncreLoraConfig``; ``lora_alpha`` keeps the LoRA's scale unless it
            is among them. Target modules and all else that says what the adapter is on come from the LoRA.

    Returns:
        The configuration that was written.

    Raises:
        ValueError: the LoRA has a part that IncreLoRA has not (``lora_bias``, an initialisation
            that changes the base weights, ...), is on separate experts of a base that fuses them, is damaged,
            or ``options`` say what the LoRA says.
        TypeError, ValueError: an argument is wrong, as for ``IncreLoraConfig``.
        FileNotFoundError: the directory is missing.
    """
    arguments.integer("r", r, at_least=1, optional=True)
    target = Path(out_dir)
    refuse_own_directory(model_or_adapter_dir, target)
    # The configuration before the tensors: an option that cannot be had gives them other shapes.
    lora = read_lora(model_or_adapter_dir, adapter_name, _refuse_unsupported)
    updates = {name: _update(module) for name, module in lora.modules.items()}
    ranks = {name: svd.rank for name, svd in updates.items()}
    experts = _expert_names(model_or_adapter_dir, lora.config)
    if not isinstance(model_or_adapter_dir, nn.Module):
        _refuse_separate_experts(lora.modules, experts)
    config = _config(lora, r or _average_rank(lora, ranks, options), ranks, experts, options)
    config.module_kinds = module_kinds({name: module.kind for name, module in lora.modules.items()})
    tensors = {key: tensor.contiguous() for key, tensor in lora.others.items()}
    for name, svd in updates.items():
        part, scale = svd.first(ranks[name]), config.scale(config.alpha_of(name), ranks[name])
        # float16 and bfloat16 would not hold orthonormal factors well enough.
        dtype = torch.promote_types(lora.modules[name].dtype, torch.float32)
        for factor, tensor in (("A", part.v), ("B", part.u), ("E", part.s.view(-1, 1) / scale)):
            tensors[f"base_model.model.{name}.lora_{factor}.weight"] = tensor.to(dtype).contiguous()
        magnitude = lora.modules[name].magnitude
        if magnitude is not None:
            # Ours are vectors, whatever the module is.
            wide = torch.promote_types(magnitude.dtype, torch.float32)
            tensors |= dora_tensor(name, magnitude.to(wide), "linear")
    with staged(target) as stage:
        save_file(tensors, stage / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(stage))
    return config


def _refuse_separate_experts(modules: Iterable[str], experts: list[str] | None) -> None:
    """Experts that are layers of their own, in a base that fuses them (``experts``), or in one not known."""
    found = sorted({name for name in modules if re.search(r"\.experts\.\d+\.", name)})
    if found and experts:
        raise ValueError(
            f"model_or_adapter_dir: the LoRA is on separate experts, {found[0]!r} among {len(found)}, which "
            "are one parameter in its base model, and an IncreLoRA adapter has no part for that. Merge it "
            "into its base model with merge_and_unload(), and start from that."
        )
    if found and experts is None:
        warn(
            f"model_or_adapter_dir: the LoRA is on separate experts, {found[0]!r} among {len(found)}, and "
            "does not say what its base model is; on one whose experts are fused, as Transformers has them, "
            "the adapter that is written has no effect there."
        )


def _refuse_unsupported(lora: LoraConfig) -> None:
    for name, value, _ in changed_options(lora, {*_OF_THE_BASE, *_DONE, "init_lora_weights"}):
        if name == "target_parameters" and len(layers_of_parameters(lora)) == len(value):
            continue
        raise ValueError(
            f"model_or_adapter_dir: the LoRA was trained with {name}={value!r}, which an IncreLoRA adapter "
            "has no part for. Merge it into its base model with merge_and_unload(), and start from that."
        )
    if lora.init_lora_weights not in _INITS:
        raise ValueError(
            f"model_or_adapter_dir: the LoRA was trained with init_lora_weights={lora.init_lora_weights!r}, "
            "which may change the base weights. Save it with path_initial_model_for_weight_conversion, "
            "which makes it a LoRA on the unchanged base, and convert that."
        )


def _expert_names(source: nn.Module | str | os.PathLike[str], lora: LoraConfig) -> list[str] | None:
    """``IncreLoraConfig.expert_names`` of the base model, as far as it is known."""
    if isinstance(source, nn.Module):
        return sorted(expert_layers(source))
    of_base = expert_layers_of_base(lora.base_model_name_or_path)
    return None if of_base is None else sorted(of_base)


def _average_rank(lora: SavedAdapter, ranks: dict[str, int], options: dict[str, Any]) -> int:
    """The least budget that holds the ranks."""
    sizes = [(module.site.out, module.site.features) for module in lora.modules.values()]
    choice = {name: options[name] for name in ("importance", "budget_unit") if name in options}
    of_rank_1 = IncreLoraConfig(r=1, **choice).budget(sizes, ())
    return math.ceil(of_rank_1.spent(ranks.values()) / of_rank_1.total)


def _update(module: SavedModule) -> Svd:
    update = module.update
    return svd_of_product(update.b.double() * update.scale, update.a)


def _config(
    lora: SavedAdapter, r: int, ranks: dict[str, int], expert_names: list[str] | None, options: dict[str, Any]
) -> IncreLoraConfig:
    for name in (*_OF_THE_BASE, "rank_pattern", "expert_names"):
        if name in options:
            raise ValueError(
                f"{name}={options[name]!r} cannot be given here, for the LoRA says it; leave it out."
            )
    theirs = lora.config
    scale = theirs.lora_alpha / (theirs.r**0.5 if theirs.use_rslora else theirs.r)
    kept = {"lora_alpha": scale * r, "lora_dropout": theirs.lora_dropout}
    kept |= {name: getattr(theirs, name) for name in _OF_THE_BASE}
    if theirs.target_parameters:
        kept["target_modules"] = list(lora.modules)
    kept["expert_names"] = expert_names
    return IncreLoraConfig(r=r, rank_pattern=rank_pattern(ranks), **(kept | options))
