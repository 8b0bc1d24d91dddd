"""The linear layers of a model."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


def linear_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer but the output embedding, by full name."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight of a linear layer, (out, in)."""
    return cast(nn.Linear, model.get_submodule(name)).weight
