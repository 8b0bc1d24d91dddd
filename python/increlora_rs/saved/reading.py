"""The trained factors of an adapter, from a model in memory or from a saved directory alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    PeftType,
    get_peft_model_state_dict,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..contract.config import MethodConfig
from ..contract.structure import SizeMismatchError, check_finite
from ..ops.update import LowRank
from ..support.budget import Budget
from ..support.files import load_weights
from ..support.names import short
from ..support.sites import Kind, Site
from .lora_format import dora_key, lora_key, matrices

# A weight by its full name: the number of a layer is in it, which an end of a name has not.
_WEIGHT = re.compile(r"^\w+(\.\w+)*\.\d+\.(\w+\.)+weight$")


@dataclass
class SavedModule:
    """One module's update.

    Args:
        update: It, its scale in it.
        site: What it is of.
        rank: Its rank.
        dtype: Of the parameters.
        magnitude: DoRA's (out); None: it has none.
    """

    update: Any
    site: Site
    rank: int
    dtype: torch.dtype
    magnitude: Tensor | None = None

    @property
    def acts(self) -> bool:
        """Does it do anything? Without components a magnitude does."""
        return self.rank > 0 or self.magnitude is not None

    @property
    def kind(self) -> Kind:
        """What the module is."""
        return self.site.kind

    def lora(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) with the scale in B, in ``dtype`` (None: float32 or wider).

        Raises:
            ValueError: the update is that of no LoRA.
        """
        factors: tuple[Tensor, Tensor] | None = self.update.lora(dtype)
        if factors is None:
            raise ValueError(
                f"model_or_adapter_dir: the update of module {self.site.name!r} is that of no LoRA; merge "
                "the adapter into its base model with merge_and_unload()."
            )
        return factors


@dataclass
class SavedAdapter:
    """A trained adapter.

    Args:
        config: Its configuration.
        modules: By full module name, sorted, ``layer.9`` before ``layer.10``.
        others: Further saved tensors (biases, ``modules_to_save``), by their key.
    """

    config: Any
    modules: dict[str, SavedModule] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total_rank(self) -> int:
        """Sum of the ranks."""
        return sum(module.rank for module in self.modules.values())

    @property
    def budget(self) -> int:
        """Total rank that the training aimed at; parameters where ``config.budget_unit`` says so."""
        return self._budget.total

    @property
    def parameters(self) -> int | None:
        """Those of the components, where the budget is in parameters; else None."""
        return self._budget.parameters(module.rank for module in self.modules.values())

    @property
    def _budget(self) -> Budget:
        sizes = [(module.site.out, module.site.features) for module in self.modules.values()]
        budget: Budget = self.config.budget(sizes, [module.rank for module in self.modules.values()])
        return budget


def read(source: nn.Module | str | os.PathLike[str], adapter_name: str = "default") -> SavedAdapter:
    """The adapter of a model, or of a directory that ``save_pretrained`` wrote.

    Raises:
        ValueError: there is no adapter of one of the methods, or it is damaged.
        FileNotFoundError: the directory, or a file of it, is missing.
        TypeError: ``source`` is neither a model nor a path.
    """
    config, tensors = _stored(source, adapter_name, MethodConfig)
    return _assemble(config, tensors)


def read_lora(
    source: nn.Module | str | os.PathLike[str],
    adapter_name: str = "default",
    check: Callable[[LoraConfig], None] = lambda config: None,
) -> SavedAdapter:
    """The plain LoRA of a model, or of a directory that ``save_pretrained`` wrote.

    Args:
        source: The model or the directory.
        adapter_name: Which adapter of a model.
        check: Raises for a configuration whose tensors cannot be read here; called before they are.

    Raises:
        ValueError: there is no LoRA adapter, or it is damaged.
        FileNotFoundError, TypeError: as for :func:`read`.
    """
    config, tensors = _stored(source, adapter_name, LoraConfig, check)
    lora = SavedAdapter(config)
    found: dict[str, dict[str, Tensor]] = {}
    magnitudes, tensors = _magnitudes(config, tensors)
    embeddings = set()
    for key, tensor in tensors.items():
        parts = lora_key(key)
        if parts is None:
            lora.others[key] = tensor
            continue
        name, factor, embedding = short(parts[0]), *parts[1:]
        found.setdefault(name, {})[factor] = tensor
        if embedding:
            embeddings.add(name)
    unknown = sorted(key for key in lora.others if ".lora_" in key)
    if unknown:
        raise ValueError(
            f"model_or_adapter_dir: {unknown[0]!r} is neither lora_A nor lora_B of a module; only those can "
            "be converted."
        )
    for name in sorted(found, key=_natural):
        a, b = _factors(name, found[name], ("A", "B"), "lora_")
        a, b, kind = matrices(a, b, name in embeddings)
        rank, site = _lora_site(name, a, b, kind)
        update = LowRank(a, b, a.new_ones(rank, 1), _lora_scale(config, name, rank))
        magnitude = _magnitude(config, site, magnitudes)
        lora.modules[name] = SavedModule(update, site, rank, a.dtype, magnitude)
    if not lora.modules:
        raise ValueError("model_or_adapter_dir: the adapter holds no module with lora_A and lora_B.")
    for name in layers_of_parameters(config):
        if name not in lora.modules:
            raise _no_layer(name)
    return lora


def _no_layer(name: str) -> ValueError:
    return ValueError(
        f"model_or_adapter_dir: the LoRA was trained with target_parameters, of which {name + '.weight'!r} "
        "is not the weight of one linear layer, and an IncreLoRA adapter has no part for others. Merge it "
        "into its base model with merge_and_unload(), and start from that."
    )


def layers_of_parameters(config: LoraConfig) -> list[str]:
    """The modules whose weight ``target_parameters`` gives by its full name, as :func:`export_lora` writes
    those that PEFT would take for experts: their tensors are a linear layer's."""
    return sorted(
        name.removesuffix(".weight") for name in config.target_parameters or () if _WEIGHT.match(name)
    )


def _lora_scale(config: LoraConfig, name: str, rank: int) -> float:
    layer = name if name in layers_of_parameters(config) else None
    name = f"{name}.weight" if layer else name
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    configured = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    if rank != configured and layer:
        raise _no_layer(layer)
    if rank != configured:
        raise ValueError(
            f"model_or_adapter_dir: lora_A of module {name!r} has {rank} rows, but the configuration makes "
            f"its rank {configured}; the adapter is damaged."
        )
    return float(alpha / (rank**0.5 if config.use_rslora else rank))


def _stored(
    source: nn.Module | str | os.PathLike[str],
    adapter_name: str,
    kind: type[LoraConfig],
    check: Callable[[Any], None] = lambda config: None,
) -> tuple[Any, dict[str, Tensor]]:
    """Configuration, of type ``kind`` and after ``check``, and tensors of an adapter of a model or directory.

    Raises:
        ValueError, FileNotFoundError, TypeError: as for :func:`read`.
    """
    if isinstance(source, nn.Module):
        return _of_model(source, adapter_name, kind, check)
    if isinstance(source, (str, os.PathLike)):
        return _of_directory(Path(source), kind, check)
    raise TypeError(
        f"model_or_adapter_dir: a {type(source).__name__} is neither a model nor the path of a saved adapter."
    )


def _of_model(
    model: nn.Module, adapter_name: str, kind: type[LoraConfig], check: Callable[[Any], None]
) -> tuple[Any, dict[str, Tensor]]:
    configs: Any = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if config is None or not _is_of(kind, type(config), config.peft_type):
        raise ValueError(
            f"model_or_adapter_dir: the model has no {_called(kind)} {adapter_name!r}; its adapters are "
            f"{list(configs)}."
        )
    check(config)
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return config, {key: tensor.detach() for key, tensor in tensors.items()}


def _is_of(wanted: type[LoraConfig], kind: type[LoraConfig] | None, peft_type: Any) -> bool:
    """Is an adapter with configurations ``kind`` one that is ``wanted``: one of ours, or a plain LoRA?"""
    if wanted is LoraConfig:
        return bool(peft_type == PeftType.LORA)
    return kind is not None and issubclass(kind, wanted)


def _called(kind: type[LoraConfig]) -> str:
    return "LoRA adapter" if kind is LoraConfig else "adapter of increlora_rs"


def _of_directory(
    folder: Path, kind: type[LoraConfig], check: Callable[[Any], None]
) -> tuple[Any, dict[str, Tensor]]:
    config_file, weights_file = folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    if not weights_file.exists() and (folder / WEIGHTS_NAME).exists():
        weights_file = folder / WEIGHTS_NAME
    for path in (folder, config_file, weights_file):
        if not path.exists():
            raise FileNotFoundError(
                f"model_or_adapter_dir: {path} does not exist; give a directory that save_pretrained "
                f"wrote, with {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}."
            )
    try:
        peft_type = json.loads(config_file.read_text())["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model_or_adapter_dir: {config_file} is not the configuration of an adapter: {error!r}."
        ) from error
    found = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if not _is_of(kind, found, peft_type):
        ours = (
            c.method.peft_type.value
            for c in PEFT_TYPE_TO_CONFIG_MAPPING.values()
            if issubclass(c, MethodConfig)
        )
        wanted = [PeftType.LORA.value] if kind is LoraConfig else list(ours)
        raise ValueError(
            f"model_or_adapter_dir: {folder} holds an adapter of type {peft_type!r}; only "
            f"{', '.join(map(repr, wanted))} can be read here."
        )
    config = found.from_pretrained(str(folder))
    check(config)
    return config, load_weights(weights_file)


def _assemble(config: MethodConfig, tensors: dict[str, Tensor]) -> SavedAdapter:
    adapter, structure = SavedAdapter(config), config.method.structure
    names = structure.saved_names(config)
    factor = re.compile(rf"^(?P<name>.+)\.(?P<factor>{'|'.join(names)})(\.weight)?$")
    found: dict[str, dict[str, Tensor]] = {}
    magnitudes, tensors = _magnitudes(config, tensors)
    for key, tensor in tensors.items():
        match = factor.match(key)
        if match is None:
            adapter.others[key] = tensor
        else:
            found.setdefault(short(match["name"]), {})[match["factor"]] = tensor
    found = structure.spread(found, config)
    for name in sorted(found, key=_natural):
        parameters = dict(zip(names, _factors(name, found[name], names), strict=True))
        site = config.site_of(name, parameters)
        structure.check(name, parameters, site, config)
        scale = config.scale(config.alpha_of(name), int(structure.rank_of(parameters)))
        parameters = structure.acting(parameters)
        rank = int(structure.rank_of(parameters))
        update = structure.update(
            parameters | structure.frozen(site, config), site, config, scale, training=False
        )
        dtype, magnitude = next(iter(parameters.values())).dtype, _magnitude(config, site, magnitudes)
        adapter.modules[name] = SavedModule(update, site, rank, dtype, magnitude)
    if not adapter.modules:
        raise ValueError(f"model_or_adapter_dir: the adapter holds no module with {', '.join(names)}.")
    return adapter


def _magnitudes(
    config: LoraConfig, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """DoRA's magnitudes by module, and the other tensors."""
    if not config.use_dora:
        return {}, tensors
    names = {key: dora_key(key) for key in tensors}
    magnitudes = {short(name): tensors[key] for key, name in names.items() if name is not None}
    return magnitudes, {key: tensor for key, tensor in tensors.items() if names[key] is None}


def _magnitude(config: LoraConfig, site: Site, magnitudes: dict[str, Tensor]) -> Tensor | None:
    """Those of one module, (out).

    Raises:
        ValueError: they are missing, do not fit, or are not finite.
    """
    if not config.use_dora:
        return None
    found = magnitudes.get(site.name)
    if found is None or found.numel() != site.out:
        what = "none" if found is None else f"shape {tuple(found.shape)}"
        raise ValueError(
            f"model_or_adapter_dir: use_dora=True, and module {site.name!r} of {site.out} outputs has "
            f"lora_magnitude_vector of {what}; the adapter is damaged."
        )
    check_finite(site.name, {"lora_magnitude_vector": found})
    return found.reshape(-1)


def _factors(name: str, factors: dict[str, Tensor], wanted: Sequence[str], prefix: str = "") -> list[Tensor]:
    """The factors of one module in the order of ``wanted``."""
    missing = sorted(set(wanted) - set(factors))
    if missing:
        raise ValueError(
            f"model_or_adapter_dir: module {name!r} has no {prefix}{missing[0]}; the adapter is damaged."
        )
    return [factors[factor] for factor in wanted]


def _lora_site(name: str, a: Tensor, b: Tensor, kind: Kind) -> tuple[int, Site]:
    """The rank and the module of a plain LoRA's matrices.

    Raises:
        ValueError: they are none, do not fit each other, or are not finite.
    """
    if a.dim() != 2 or b.dim() != 2:
        raise ValueError(
            f"model_or_adapter_dir: lora_A and lora_B of module {name!r} have shapes "
            f"{tuple(a.shape)} and {tuple(b.shape)}; they must be matrices."
        )
    rank = int(a.shape[0])
    if b.shape[1] != rank or 0 in (*a.shape, *b.shape):
        raise SizeMismatchError(
            f"size mismatch: lora_B of module {name!r} has shape {tuple(b.shape)} in the adapter, but its "
            f"lora_A has {tuple(a.shape)}, with a rank of 1 or more; the adapter is damaged."
        )
    check_finite(name, {"lora_A": a, "lora_B": b})
    return rank, Site(name, kind, int(b.shape[0]), int(a.shape[1]))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts ``layer.10`` after ``layer.9``."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]
