"""Which calls of an optimizer's ``step`` move nothing, and so are no step of a training?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..resizing.cut import here


def has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Is there a gradient at all? Without one, no optimizer touches a parameter."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def is_trial(optimizer: torch.optim.Optimizer) -> bool:
    """Is every learning rate 0, and every gradient?

    So ``torch.distributed.checkpoint.state_dict`` makes a fresh optimizer fill in its state. A learning rate
    of 0 alone is the first step of many a warm-up.
    """
    # Gradients are looked at only where it may be one, for a look waits for the device.
    if not all(_stands_still(group) for group in optimizer.param_groups):
        return False
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
    return not any(gradient is not None and _moves(gradient) for gradient in gradients)


def _stands_still(group: dict[str, Any]) -> bool:
    lr = group.get("lr")
    if isinstance(lr, Tensor):
        # The trial's is on the CPU; a look at another would wait for the device in every step.
        return lr.device.type == "cpu" and not bool(lr)
    return lr == 0.0


def _moves(gradient: Tensor) -> bool:
    values = gradient._values() if gradient.is_sparse else here(gradient)
    return bool(values.any())
