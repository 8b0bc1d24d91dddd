"""Parameters that accelerate keeps on the CPU or on disk between the calls of a module, and meanwhile on
``meta``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn


def hook_of(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that loads the module's parameters for a call and lets them go after it; None without one."""
    hook: Any = module.__dict__.get("_hf_hook")
    # Several hooks in one: accelerate's SequentialHook.
    for each in getattr(hook, "hooks", (hook,)):
        if isinstance(each, AlignDevicesHook) and each.offload:
            return each
    return None


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Loads what is offloaded of the modules and what lies in them, for as long as the context lasts."""
    loaded: list[tuple[AlignDevicesHook, nn.Module]] = []
    try:
        for module in (inner for outer in modules for inner in outer.modules()):
            hook = hook_of(module)
            if hook is not None:
                hook.pre_forward(module)
                loaded.append((hook, module))
        yield
    finally:
        for hook, module in reversed(loaded):
            hook.post_forward(module, torch.empty(0))
