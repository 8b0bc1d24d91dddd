"""An IncreLoRA adapter as a plain LoRA, exact, for whatever loads LoRA adapters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import staged
from .model import anchored
from .source import Adapter, Factors, read


def export_lora(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    layout: Literal["uniform", "compact"] = "uniform",
    rank: int | None = None,
    *,
    adapter_name: str = "default",
) -> LoraConfig:
    """Writes the adapter to ``out_dir`` as a plain PEFT LoRA that gives the same outputs.

    E and the scale are multiplied into B, in float32, and ``lora_alpha`` equals the rank, so the
    scale that a consumer applies is 1.

    Args:
        model_or_adapter_dir: A model with an IncreLoRA adapter, or a directory that
            ``save_pretrained`` wrote; the base model is not needed.
        out_dir: Where to write ``adapter_config.json`` and ``adapter_model.safetensors``.
        layout: "uniform": every module zero-padded to one rank, which PEFT, vLLM, TGI and llama.cpp
            all read rightly. "compact": each module its own rank, by ``rank_pattern`` and
            ``alpha_pattern``: smaller, for PEFT and for servers that honour these.
        rank: The uniform rank, at least the largest of the adapter; None: the largest.
        adapter_name: Which adapter of a model.

    Returns:
        The configuration that was written.

    Raises:
        ValueError: ``layout`` is unknown, ``rank`` is below the adapter's largest or given for
            "compact", or the adapter is damaged.
        FileNotFoundError: the directory is missing.
    """
    adapter = read(model_or_adapter_dir, adapter_name)
    if layout not in ("uniform", "compact"):
        raise ValueError(f"layout={layout!r} is unknown; it must be 'uniform' or 'compact'.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise TypeError(f"rank={rank!r} must be an integer, or None.")
    largest = max(module.rank for module in adapter.modules.values())
    if rank is not None and layout == "compact":
        raise ValueError(f"rank={rank} goes with layout='uniform' only; leave it out.")
    if rank is not None and rank < largest:
        raise ValueError(
            f"rank={rank} is below the adapter's largest rank, {largest}, and exporting is exact; give "
            f"{largest} or more."
        )
    config = _config(adapter, layout, rank or largest)
    tensors = {key: tensor.contiguous() for key, tensor in adapter.others.items()}
    for name, module in adapter.modules.items():
        a, b = _baked(module, config.r if layout == "uniform" else module.rank)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    target = Path(out_dir)
    if (
        not isinstance(model_or_adapter_dir, nn.Module)
        and target.resolve() == Path(model_or_adapter_dir).resolve()
    ):
        raise ValueError(
            f"out_dir={str(out_dir)!r} is the directory of the adapter itself, which the plain LoRA would "
            "replace; give another."
        )
    with staged(target) as stage:
        save_file(tensors, stage / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(stage))
    return config


def _config(adapter: Adapter, layout: str, rank: int) -> LoraConfig:
    ours = adapter.config
    ranks = dict(
        zip(
            anchored(tuple(adapter.modules)),
            (module.rank for module in adapter.modules.values()),
            strict=True,
        )
    )
    patterns = {} if layout == "uniform" else {"rank_pattern": ranks, "alpha_pattern": dict(ranks)}
    return LoraConfig(
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        revision=ours.revision,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=_target_modules(ours.target_modules),
        exclude_modules=_target_modules(ours.exclude_modules),
        layers_to_transform=ours.layers_to_transform,
        layers_pattern=ours.layers_pattern,
        modules_to_save=ours.modules_to_save,
        bias=ours.bias,
        **patterns,
    )


def _target_modules(modules: object) -> object:
    return sorted(modules) if isinstance(modules, (set, list, tuple)) else modules


def _baked(module: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with E and the scale in B, zero-padded."""
    wide = torch.promote_types(module.a.dtype, torch.float32)
    b = module.b.to(wide) * (module.e.to(wide).view(-1) * module.scale)
    a_padded = module.a.new_zeros(rank, module.a.shape[1])
    b_padded = module.b.new_zeros(module.b.shape[0], rank)
    a_padded[: module.rank] = module.a
    b_padded[:, : module.rank] = b.to(module.b.dtype)
    return a_padded, b_padded
