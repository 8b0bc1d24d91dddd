"""Is a saved adapter of the kind that it is to be loaded over? PEFT reads no configuration then, and tensors
of the same shapes may stand for another update."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ..contract.config import MethodConfig


def check_same_adapter(known: MethodConfig, folder: Path, adapter_name: str) -> None:
    """Compares the configuration in ``folder``, where there is one, with that of the adapter in the model.

    Args:
        known: The configuration of the adapter in the model.
        folder: A directory that ``save_pretrained`` wrote.
        adapter_name: Name of the adapter in the model.

    Raises:
        ValueError: the saved adapter is of another method, or its tensors mean another update.
    """
    saved = _saved(folder / CONFIG_NAME)
    own, found = known.peft_type.value, saved.get("peft_type")
    if found is not None and found != own:
        raise ValueError(
            f"model_id: {folder} holds an adapter of type {found!r}, and adapter_name={adapter_name!r} of "
            f"the model is of {own!r}; make the model with the configuration that was trained, or load the "
            "adapter into a fresh base model by PeftModel.from_pretrained."
        )
    for name in known.meaning:
        # As the file has it: a tuple is a list there.
        value = json.loads(json.dumps(getattr(known, name), default=list))
        if name in saved and saved[name] != value:
            raise ValueError(
                f"model_id: {folder} holds an adapter of {name}={saved[name]!r}, and adapter_name="
                f"{adapter_name!r} of the model has {name}={value!r}, with which its numbers are another "
                f"update; make the model with {name}={saved[name]!r}, or load the adapter into a fresh base "
                "model by PeftModel.from_pretrained."
            )


def _saved(file: Path) -> dict[str, Any]:
    """The configuration; nothing where there is none that can be read, for PEFT does without."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
