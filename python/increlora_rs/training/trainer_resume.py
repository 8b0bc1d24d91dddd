"""Trainer's resume under FSDP. Of a sharded base accelerate fills in tensors that have the checkpoint's sizes
already, and keys that the live optimizer has, so model and optimizer take these first. What FSDP1 has
flattened it gives to PEFT, whose names for the parameters are not those that FSDP1 has them saved by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from transformers import trainer

from ..layers.found import all_adapted_layers
from ..support.names import as_saved
from . import checkpoint
from .distributed_checkpoint import take_sizes

# Where accelerate writes the model's part of a SHARDED_STATE_DICT, and of a FULL_STATE_DICT.
_MODEL, _WHOLE = "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"


def watch_resume() -> None:
    """Has Trainer's next resume find an adapter of the checkpoint's ranks, whatever it began with."""
    # Trainer tells no callback of a resume before the model is loaded.
    for name, prepared in (("load_fsdp_model", _sized), ("load_fsdp_optimizer", _with_key)):
        load = getattr(trainer, name, None)
        if load is not None and not hasattr(load, "_increlora_resumes"):
            watched = prepared(load)
            watched._increlora_resumes = True  # type: ignore[attr-defined]
            setattr(trainer, name, watched)


def _sized(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_fsdp_model(
        plugin: Any, accelerator: Any, model: Any, input_dir: Any, *args: Any, **kw: Any
    ) -> Any:
        if all_adapted_layers(model) and plugin.fsdp_version == 1:
            return _load_flat(model, Path(input_dir) / _WHOLE)
        folder = Path(input_dir) / _MODEL
        if all_adapted_layers(model) and (folder / ".metadata").is_file():
            take_sizes(model, folder)
        return load(plugin, accelerator, model, input_dir, *args, **kw)

    return load_fsdp_model


def _load_flat(model: Any, file: Path) -> Any:
    """Loads what PEFT saved, by the names that it has there: without the adapter's."""
    saved = torch.load(file, map_location="cpu", weights_only=True)
    names = [as_saved(name) for name, _ in model.named_parameters()]
    held = {_saved_name(name, model.active_adapter): name for name in names}
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        return model.load_state_dict({held[name]: value for name, value in saved.items()}, strict=False)


def _saved_name(name: str, adapter: str) -> str:
    return name.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".")


def _with_key(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_fsdp_optimizer(
        plugin: Any, accelerator: Any, optimizer: Any, model: Any, *args: Any, **kw: Any
    ) -> Any:
        if all_adapted_layers(model):
            optimizer.param_groups[0].setdefault(checkpoint.KEY, checkpoint.HELD)
        return load(plugin, accelerator, optimizer, model, *args, **kw)

    return load_fsdp_optimizer
