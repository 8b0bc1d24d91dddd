"""What a group of an optimizer does to its parameters: the schedule's share of a step, and the decay."""

from __future__ import annotations

from typing import Any

import torch

from ..resizing.optimizer_starts import holder


def multiplier(group: dict[str, Any]) -> float:
    """The learning rate of now as a part of the group's first one."""
    lr, initial = float(group["lr"]), initial_lr(group)
    return lr / initial if initial > 0.0 else 0.0


def initial_lr(group: dict[str, Any]) -> float:
    """The group's learning rate before any schedule."""
    return float(group.get("initial_lr", group["lr"]))


def is_decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Does weight decay shrink the parameters directly, as AdamW's, and not through the gradient?"""
    return bool(group.get("decoupled_weight_decay", isinstance(holder(optimizer), torch.optim.AdamW)))


def decoupled_decay(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    """The part of its value that a parameter loses in a step to a decoupled weight decay."""
    decay = float(group["lr"]) * float(group.get("weight_decay", 0.0))
    return decay if is_decoupled(optimizer, group) else 0.0
