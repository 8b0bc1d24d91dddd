"""A training's part of an optimizer's checkpoint: where it lies, in what form, and is it of the training at
hand?"""

from __future__ import annotations

import base64
import json
from typing import Any

import torch
from torch import Tensor

from ..support.warning import warn
from .earlier_checkpoints import in_this_form

# Key in the optimizer's first parameter group: there the state travels with every checkpoint of the
# optimizer, and is found whether it is loaded before or after `attach`.
KEY = "increlora"
# What stands there while a scheduler is attached, from the first moment on: tools that match a checkpoint
# with a live optimizer do it key by key. The state itself is only in what `state_dict` gives, so that a
# printed optimizer stays short and a compiled one sees a constant.
HELD = "held by the scheduler"
VERSION = 3


def pack(state: dict[str, Any]) -> str:
    """``state`` as one value that every tool takes for a hyperparameter.

    A string: it has no size that could differ from the live optimizer's, no device, no keys to flatten, and
    is read by ``torch.load(weights_only=True)``.
    """
    return json.dumps(state, default=_tensor_to_json)


def unpack(value: Any) -> dict[str, Any]:
    """What :func:`pack` was given; a state of an earlier version in the form of this one.

    Raises:
        ValueError: it is neither.
    """
    try:
        state = json.loads(value, object_hook=_tensor_from_json) if isinstance(value, str) else value
        if not isinstance(state, dict) or "version" not in state:
            raise ValueError(f"it is a {type(state).__name__} without a version")
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"optimizer: the scheduler's state under {KEY!r} in its first parameter group cannot be read "
            f"({error}); load a checkpoint that is whole, or take the key out to start the scores anew."
        ) from error
    if state["version"] not in range(1, VERSION + 1):
        raise ValueError(
            f"optimizer: its scheduler's state has version {state['version']}, this release reads up to "
            f"{VERSION}; resume with the release that saved it."
        )
    return in_this_form(state)


def _tensor_to_json(value: Any) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        raise TypeError(f"{type(value).__name__} has no place in a checkpoint")
    # As bytes, for a number of its own in text takes twice the room.
    flat = value.detach().cpu().contiguous().reshape(-1)
    data = base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode()
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "data": data}


def _tensor_from_json(found: dict[str, Any]) -> Any:
    if found.keys() != {"dtype", "shape", "data"}:
        return found
    dtype = getattr(torch, found["dtype"])
    data = bytearray(base64.b64decode(found["data"], validate=True))
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(found["shape"])


def check(saved: dict[str, Any], method: str, modules: list[str], total_steps: int | None) -> None:
    """Tells what of a saved state differs from the training that resumes it.

    Args:
        method: Name of the adapter's method.
        modules: Full names, in model order.

    Raises:
        ValueError: it is of another method, or of other modules.
    """
    if saved["method"] != method:
        raise ValueError(
            f"optimizer: its scheduler's state is of a training with {saved['method']!r}, but the adapter's "
            f"method is {method!r}; resume with the configuration that was trained."
        )
    if saved["modules"] != modules:
        raise ValueError(
            f"optimizer: its scheduler's state is of {len(saved['modules'])} modules, "
            f"{saved['modules'][:1]} the first, but the model adapts {len(modules)}, "
            f"{modules[:1]} the first; resume with the model and target_modules that were trained."
        )
    if saved["total_steps"] != total_steps:
        warn(
            f"total_steps={total_steps}, but the run that is resumed was planned for "
            f"{saved['total_steps']}: what changes with the steps, such as ranks, goes on by that plan; what "
            "is done last is done at the end of this one"
        )
