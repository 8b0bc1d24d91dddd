"""The adapted layers of a model."""

from __future__ import annotations

from torch import nn

from .base import AdaptedLayer


def all_adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """The layers with any adapter, in model order."""
    return [module for module in model.modules() if isinstance(module, AdaptedLayer)]


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, AdaptedLayer]:
    """The layers with adapter ``adapter_name``, by full module name, in model order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLayer) and adapter_name in module.adapters
    }
