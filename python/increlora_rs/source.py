"""The trained factors of an adapter, from a model in memory or from a saved directory alone."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from .config import IncreLoraConfig
from .files import check_weights_file
from .model import check_factors, short
from .peft_type import PEFT_TYPE

_FACTOR = re.compile(r"^(?P<name>.+)\.lora_(?P<factor>[ABE])$")


@dataclass
class Factors:
    """One module's update: ``scale * B diag(E) A``."""

    a: Tensor
    b: Tensor
    e: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Number of components."""
        return int(self.e.shape[0])


@dataclass
class Adapter:
    """A trained adapter.

    Args:
        config: Its configuration.
        modules: Factors by full module name, sorted, ``layer.9`` before ``layer.10``.
        others: Further saved tensors (biases, ``modules_to_save``), by their key.
    """

    config: IncreLoraConfig
    modules: dict[str, Factors] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total_rank(self) -> int:
        """Sum of the ranks."""
        return sum(module.rank for module in self.modules.values())

    @property
    def budget(self) -> int:
        """Total rank that the training aimed at."""
        return self.config.r * len(self.modules)


def read(source: nn.Module | str | os.PathLike[str], adapter_name: str = "default") -> Adapter:
    """The adapter of a model, or of a directory that ``save_pretrained`` wrote.

    Raises:
        ValueError: there is no IncreLoRA adapter, or it is damaged.
        FileNotFoundError: the directory, or a file of it, is missing.
        TypeError: ``source`` is neither a model nor a path.
    """
    if isinstance(source, nn.Module):
        return _from_model(source, adapter_name)
    if isinstance(source, (str, os.PathLike)):
        return _from_directory(Path(source))
    raise TypeError(
        f"model_or_adapter_dir: a {type(source).__name__} is neither a model nor the path of a saved adapter."
    )


def _from_model(model: nn.Module, adapter_name: str) -> Adapter:
    configs: Any = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, IncreLoraConfig):
        raise ValueError(
            f"model_or_adapter_dir: the model has no IncreLoRA adapter {adapter_name!r}; its adapters "
            f"are {list(configs)}."
        )
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return _assemble(config, tensors)


def _from_directory(folder: Path) -> Adapter:
    config_file, weights_file = folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME
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
    if peft_type != PEFT_TYPE:
        raise ValueError(
            f"model_or_adapter_dir: {folder} holds an adapter of type {peft_type!r}; only "
            f"{PEFT_TYPE.value!r} can be read here."
        )
    check_weights_file(str(weights_file))
    config = IncreLoraConfig.from_pretrained(str(folder))
    return _assemble(config, load_file(weights_file))


def _assemble(config: IncreLoraConfig, tensors: dict[str, Tensor]) -> Adapter:
    found: dict[str, dict[str, Tensor]] = {}
    adapter = Adapter(config)
    for key, tensor in tensors.items():
        match = _FACTOR.match(key)
        if match is None:
            adapter.others[key] = tensor.detach()
        else:
            found.setdefault(short(match["name"]), {})[match["factor"]] = tensor.detach()
    for name in sorted(found, key=_natural):
        missing = sorted(set("ABE") - set(found[name]))
        if missing:
            raise ValueError(
                f"model_or_adapter_dir: module {name!r} has no lora_{missing[0]}; the adapter is damaged."
            )
        a, b, e = (found[name][factor] for factor in "ABE")
        if a.dim() != 2 or b.dim() != 2:
            raise ValueError(
                f"model_or_adapter_dir: lora_A and lora_B of module {name!r} have shapes "
                f"{tuple(a.shape)} and {tuple(b.shape)}; they must be matrices."
            )
        check_factors(name, a, b, e, int(a.shape[1]), int(b.shape[0]))
        scale = config.scale(config.alpha_of(name), int(e.shape[0]))
        adapter.modules[name] = Factors(a, b, e, scale)
    if not adapter.modules:
        raise ValueError("model_or_adapter_dir: the adapter holds no module with lora_A, lora_B, lora_E.")
    return adapter


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts ``layer.10`` after ``layer.9``."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]
