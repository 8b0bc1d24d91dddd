"""An adapter as a plain LoRA, for whatever loads LoRA adapters: exact, or of a smaller rank."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from ..support import arguments
from ..support.experts import expert_names_of
from ..support.files import refuse_own_directory, staged
from ..support.lowrank import svd_of_product
from ..support.names import rank_pattern
from ..support.unfused import unfused_layers_of_base
from .dtypes import in_dtype
from .lora_format import dora_tensor, lora_tensors, padded
from .reading import SavedAdapter, SavedModule, read
from .separate_format import Separate, separate
from .stacked_format import Stacked, matrices_of, stacked

# What vLLM takes as --max-lora-rank; an adapter may have any rank up to it.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Export:
    """What :func:`export_lora` wrote.

    Args:
        config: The configuration.
        errors: By module, the Frobenius norm of what its update lost, as a part of the update's; 0.0
            where nothing was cut.
        error: The same of all updates together.
    """

    config: LoraConfig
    errors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0

    @property
    def max_lora_rank(self) -> int | None:
        """The ``--max-lora-rank`` that vLLM needs for this LoRA; None: the rank is above all it has."""
        return next((rank for rank in VLLM_RANKS if rank >= self.config.r), None)


def export_lora(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    layout: Literal["uniform", "compact"] = "uniform",
    rank: int | None = None,
    *,
    vllm_rank: bool = False,
    experts: Literal["fused", "separate"] = "fused",
    dtype: torch.dtype | None = None,
    adapter_name: str = "default",
) -> Export:
    """Writes the adapter to ``out_dir`` as a plain PEFT LoRA that gives the same outputs.

    E and the scale are multiplied into B, in float32, and ``lora_alpha`` equals the rank, so the
    scale that a consumer applies is 1. A module of rank 0 has no part in the LoRA, whose
    ``target_modules`` are then the full names of the others. A DoRA stays one, with its magnitudes in full
    precision; a module of rank 0, whose magnitude acts, has a component of zeros. In a mixture of experts,
    dense and shared layers that are called as the experts are stand in ``target_parameters``: in
    ``target_modules`` PEFT would take them for these.

    Args:
        model_or_adapter_dir: A model with an adapter of one of the methods, or a directory that
            ``save_pretrained`` wrote; the base model is not needed.
        out_dir: Where to write ``adapter_config.json`` and ``adapter_model.safetensors``.
        layout: "uniform": every module zero-padded to one rank, which PEFT, vLLM, TGI and llama.cpp
            all read rightly. "compact": each module its own rank, by ``rank_pattern`` and
            ``alpha_pattern``: smaller, for PEFT, vLLM and other servers that honour these.
        rank: The uniform rank; in the compact layout the most that a module keeps. None: the largest
            of the adapter, and nothing is lost. A module of a higher rank becomes the nearest update of
            this rank (singular value decomposition of B diag(E) A), and :class:`Export` has the error.
        vllm_rank: Round the uniform rank up to one that vLLM takes as ``--max-lora-rank``.
        experts: How adapted experts of ``target_parameters`` are written. "fused": several in one pair, as
            PEFT has them. "separate": a pair for each layer that an expert was before Transformers fused it,
            by its name in checkpoints, such as ``mlp.experts.3.up_proj``, as vLLM reads them. All experts of
            a layer have all projections then, of zeros where nothing was adapted, and one rank a projection
            in the compact layout too.
        dtype: Of the tensors written; None: the adapter's own.
        adapter_name: Which adapter of a model.

    Returns:
        The configuration that was written, the errors, and the ``--max-lora-rank`` for vLLM.

    Raises:
        ValueError: ``layout`` is unknown, ``rank`` is below 1 or, for "compact", above the adapter's
            largest, ``vllm_rank`` is given for "compact" or for a rank above 512, a value is too large for
            ``dtype``, the adapter is damaged, every module is of rank 0, or one that is not is a convolution
            that PEFT's LoRA would compute in another way; or a DoRA is on what PEFT takes for fused experts.
            ``experts`` is "separate", and the adapter is on no experts, or on such as checkpoints never had
            apart, or of a base that is not known.
        TypeError: ``dtype`` is no floating-point dtype.
        FileNotFoundError: the directory is missing.
    """
    arguments.choice("experts", experts, ("fused", "separate"))
    adapter = read(model_or_adapter_dir, adapter_name)
    target = Path(out_dir)
    refuse_own_directory(model_or_adapter_dir, target)
    loras = {name: _factors(module) for name, module in adapter.modules.items() if module.acts}
    if not loras:
        raise ValueError(
            f"model_or_adapter_dir: each of the {len(adapter.modules)} modules has rank 0, so that the "
            "adapter does nothing and there is no LoRA to write; train it, or use the base model."
        )
    _refuse_unlike_lora(adapter, loras)
    # An update's own rank need not be that of the LoRA that does the same.
    rank = _rank(max(a.shape[0] for a, _ in loras.values()), layout, rank, vllm_rank)
    _check_dtype(dtype)
    tensors = {key: _cast(key, tensor, dtype) for key, tensor in _others(adapter).items()}
    factors, errors, error = _cut(loras, rank)
    parts = _of_parameters(adapter, factors, rank if layout == "uniform" else None, experts)
    for part in parts:
        of_part = dtype or adapter.modules[part.source].dtype
        tensors |= {key: _cast(key, value, of_part) for key, value in part.tensors().items()}
    matrices = _matrices(adapter)
    ranks = {}
    for name, (a, b) in factors.items():
        if name in matrices:
            continue
        if layout == "uniform":
            a, b = padded(a, b, rank)
        module = adapter.modules[name]
        for key, tensor in lora_tensors(name, a, b, module.kind).items():
            # Modules that share parameters may share what was made of them, and a file holds nothing twice.
            tensors[key] = _cast(key, tensor, dtype or module.dtype).clone()
        if module.magnitude is not None:
            # In full: rounded to half precision it would scale whole outputs.
            tensors |= dora_tensor(name, module.magnitude.clone(), module.kind)
        ranks[name] = a.shape[0]
    taken = _taken_for_experts(adapter, list(ranks))
    if taken and adapter.config.use_dora:
        raise ValueError(
            f"model_or_adapter_dir: PEFT takes {taken} for fused experts of the base by their names, and "
            "applies no DoRA to such; merge the adapter with merge_and_unload()."
        )
    config = _config(adapter, layout, ranks, parts, rank, taken)
    with staged(target) as stage:
        save_file(tensors, stage / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(stage))
    # Of what is left out nothing is lost.
    return Export(config, dict.fromkeys(adapter.modules, 0.0) | errors, error)


def _of_parameters(
    adapter: SavedAdapter, factors: dict[str, tuple[Tensor, Tensor]], rank: int | None, experts: str
) -> list[Stacked] | list[Separate]:
    """The LoRAs of the parameters of ``target_parameters``, of rank ``rank`` or, for None, their own."""
    parameters = dict(adapter.config.adapted_parameters)
    if experts == "fused":
        return stacked(factors, parameters, rank)
    layers = adapter.config.unfused_layers
    if layers is None:
        # An earlier version saved it.
        layers = unfused_layers_of_base(adapter.config.base_model_name_or_path, parameters)
    if layers is None:
        raise ValueError(
            "experts='separate': the adapter does not say what its base model is, which gives experts their "
            "names; export the model in memory instead."
        )
    return separate(factors, parameters, layers, rank)


def _matrices(adapter: SavedAdapter) -> set[str]:
    """The modules that are experts or routers of ``target_parameters``."""
    return {one for ones in matrices_of(dict(adapter.config.adapted_parameters)).values() for one in ones}


def _factors(module: SavedModule) -> tuple[Tensor, Tensor]:
    """A and B; of a module that has nothing but a magnitude a component that does nothing, for no LoRA has
    rank 0."""
    a, b = module.lora()
    return (a, b) if a.shape[0] else padded(a, b, 1)


def _refuse_unlike_lora(adapter: SavedAdapter, names: Iterable[str]) -> None:
    unlike = [name for name in names if name in adapter.config.unlike_lora]
    if unlike:
        raise ValueError(
            f"model_or_adapter_dir: {unlike} are convolutions with a dilation or a padding_mode, which "
            "PEFT's LoRA leaves out, so a plain LoRA would give other outputs. Merge the adapter instead, by "
            "merge_and_unload(), or leave these modules out of target_modules."
        )


def _others(adapter: SavedAdapter) -> dict[str, Tensor]:
    """Further tensors; not the weights of adapted embeddings, which PEFT saves too, though frozen, and of
    which vLLM skips some and refuses the others."""
    weights = {f"base_model.model.{name}.base_layer.weight" for name in adapter.modules}
    return {key: tensor for key, tensor in adapter.others.items() if key not in weights}


def _rank(largest: int, layout: str, rank: int | None, vllm_rank: bool) -> int:
    """The rank of the export of an adapter whose largest is ``largest``, the largest one in the compact
    layout."""
    if layout not in ("uniform", "compact"):
        raise ValueError(f"layout={layout!r} is unknown; it must be 'uniform' or 'compact'.")
    arguments.integer("rank", rank, at_least=1, optional=True)
    arguments.choice("vllm_rank", vllm_rank, (True, False))
    if layout == "compact" and vllm_rank:
        raise ValueError("vllm_rank=True pads, and goes with layout='uniform' only; leave it out.")
    if layout == "compact" and rank is not None and rank > largest:
        raise ValueError(
            f"rank={rank} is above the adapter's largest rank, {largest}, and only layout='uniform' pads; "
            "leave it out."
        )
    wanted = largest if rank is None else rank
    if not vllm_rank:
        return wanted
    rounded = next((taken for taken in VLLM_RANKS if taken >= wanted), None)
    if rounded is None:
        raise ValueError(
            f"vllm_rank=True: the rank is {wanted}, and vLLM takes at most {VLLM_RANKS[-1]}; give rank="
            f"{VLLM_RANKS[-1]} or less, which cuts."
        )
    return rounded


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype!r} must be a floating-point torch.dtype, or None.")


def _cut(
    factors: dict[str, tuple[Tensor, Tensor]], rank: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float], float]:
    """A and B of at most ``rank`` by module, what each lost, and what all lost together."""
    errors = dict.fromkeys(factors, 0.0)
    if all(a.shape[0] <= rank for a, _ in factors.values()):
        return factors, errors, 0.0
    cut = {}
    lost = whole = 0.0
    for name, (a, b) in factors.items():
        svd = svd_of_product(b, a)
        norm = svd.norm_beyond(0)
        whole = math.hypot(whole, norm)
        cut[name] = a, b
        if a.shape[0] > rank:
            beyond, first = svd.norm_beyond(rank), svd.first(rank)
            lost = math.hypot(lost, beyond)
            errors[name] = beyond / norm if norm else 0.0
            cut[name] = first.v, first.u * first.s
    return cut, errors, lost / whole if whole else 0.0


def _cast(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None and tensor.is_floating_point():
        tensor = in_dtype(tensor, dtype, key, "torch.bfloat16 or torch.float32")
    return tensor.contiguous()


def _taken_for_experts(adapter: SavedAdapter, modules: list[str]) -> list[str] | None:
    """Those of ``modules`` whose names are those of fused experts to PEFT, in a base model that has such;
    else None.

    Raises:
        ValueError: one of them is no linear layer, which only ``target_modules`` could name.
    """
    names = expert_names_of(adapter.config, modules)
    if not names:
        return None
    taken = [name for name in modules if name.rpartition(".")[2] in names]
    for name in taken:
        kind = "Conv1D" if adapter.config.fan_in_fan_out else adapter.modules[name].kind
        if kind != "linear":
            raise ValueError(
                f"model_or_adapter_dir: PEFT takes {name!r} for a fused expert of the base by its name, and "
                f"its kind, {kind!r}, cannot be named otherwise; merge the adapter with merge_and_unload()."
            )
    return taken


def _config(
    adapter: SavedAdapter,
    layout: str,
    ranks: dict[str, int],
    parts: list[Stacked] | list[Separate],
    rank: int,
    taken: list[str] | None,
) -> LoraConfig:
    """That of modules of these ranks and of ``parts``; ``taken`` are modules named as parameters."""
    ours, known = adapter.config, set(taken or ())
    targets = _target_modules(ours.target_modules)
    separated = [part for part in parts if isinstance(part, Separate)]
    fused = {part.name: part.rank for part in parts if isinstance(part, Stacked)}
    names = [name for name in ranks if name not in known]
    matrices = _matrices(adapter)
    left_out = [name for name in adapter.modules if name not in ranks and name not in matrices]
    layers = None if left_out else ours.layers_to_transform
    if left_out:
        # PEFT takes a name in a list for the end of names, too.
        exact = taken is None and (isinstance(targets, str) or any(_adapts(name, left_out) for name in names))
        targets = "|".join(map(re.escape, names)) if exact and names else names
    elif taken is not None:
        # A regular expression would be resolved to the last parts of names, and match more than it did.
        taken_ends = {name.rpartition(".")[2] for name in taken}
        if isinstance(targets, list):
            targets = [
                name for name in targets if _adapts(name, names) and name.rpartition(".")[2] not in taken_ends
            ]
        else:
            targets = names
    if separated:
        ends = {part.name.rpartition(".")[2] for part in separated}
        targets = sorted({*(targets or ()), *ends})
    parameters = list(fused)
    if len(fused) == len(ours.adapted_parameters):
        # In the user's words.
        parameters = sorted(ours.target_parameters or ())
    parameters += [f"{name}.weight" for name in taken or ()]
    ranks = {f"{name}.weight" if name in known else name: rank for name, rank in ranks.items()} | fused
    pattern = {}
    if layout == "compact":
        pattern = rank_pattern(ranks) | {part.pattern: part.rank for part in separated}
    return LoraConfig(
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        revision=ours.revision,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        fan_in_fan_out=ours.fan_in_fan_out,
        target_modules=targets,
        target_parameters=parameters or None,
        exclude_modules=_target_modules(ours.exclude_modules),
        layers_to_transform=layers,
        layers_pattern=None if left_out else ours.layers_pattern,
        modules_to_save=ours.modules_to_save,
        trainable_token_indices=ours.trainable_token_indices,
        bias=ours.bias,
        use_dora=ours.use_dora,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
    )


def _adapts(target: str, modules: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in modules)


def _target_modules(modules: Any) -> Any:
    return sorted(modules) if isinstance(modules, (set, list, tuple)) else modules
