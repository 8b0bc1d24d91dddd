"""The ranks of a layer's adapters, and the scales: what the rank makes of them, times what a user set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Layer(Protocol):
    """What is read of an adapted layer."""

    adapters: Any
    configs: dict[str, Any]
    lora_alpha: dict[str, float]
    structure: Any

    def rank(self, adapter_name: str) -> int:
        """The rank."""

    def tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The parameters."""

    def has_room(self, adapter_name: str) -> bool:
        """Is it in the capacity form?"""


class Ranks(Mapping[str, int]):
    """The rank by adapter name, read off the factors whenever it is asked for.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def __getitem__(self, name: str) -> int:
        return self._layer.rank(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.adapters)

    def __len__(self) -> int:
        return len(self._layer.adapters)

    def __repr__(self) -> str:
        return repr(dict(self))


@dataclass
class _Scale:
    """``factor * alpha / divisor``.

    Args:
        factor: What the user asked for, on top of what the configuration makes; as a tensor, float64 (1) on
            the CPU, too: it keeps its identity, so a compiled graph can read it. (A scalar would be read as a
            number when the graph is made.)
        divisor: None: the rank, or its root.
    """

    factor: float
    tensor: Tensor
    alpha: float
    divisor: float | None
    root: bool


class Scales(MutableMapping[str, float]):
    """The scale s by adapter name.

    Where it follows the rank it is made from the rank whenever it is read, so it cannot fall behind.

    Args:
        layer: The layer, whose ``lora_alpha``, ``configs`` and ranks are read.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._scales: dict[str, _Scale] = {}

    def configure(self, name: str, factor: float = 1.0) -> None:
        """Sets the scale to ``factor`` times what alpha and configuration make now."""
        layer, known = self._layer, self._scales.get(name)
        config, alpha = layer.configs[name], layer.lora_alpha[name]
        if known is None:
            tensor = torch.tensor([factor], dtype=torch.float64, device="cpu")
        else:
            tensor = known.tensor.fill_(factor)
        divisor = None if config.scale_follows_rank else config.divisor(layer.rank(name))
        self._scales[name] = _Scale(factor, tensor, alpha, divisor, config.use_rslora)

    def in_graph(self, name: str) -> Tensor:
        """A scale that follows the rank, for a graph, which knows no rank: float64 (1) on the CPU."""
        scale, layer = self._scales[name], self._layer
        # Not as a number: a graph must not know it.
        # In the capacity form a graph sees no size, and is made anew for another rank.
        rank = layer.rank(name) if layer.has_room(name) else layer.structure.rank_of(layer.tensors(name))
        divisor = (torch.ones(1, dtype=torch.float64, device="cpu") * rank).clamp(min=1.0)
        return scale.tensor * scale.alpha / (divisor.sqrt() if scale.root else divisor)

    def _unscaled(self, name: str) -> float:
        scale = self._scales[name]
        if scale.divisor is not None:
            return scale.alpha / scale.divisor
        return scale.alpha / self._layer.configs[name].divisor(self._layer.rank(name))

    def __getitem__(self, name: str) -> float:
        return self._scales[name].factor * self._unscaled(name)

    def __setitem__(self, name: str, value: float) -> None:
        if isinstance(value, Tensor):
            raise ValueError(
                f"the scale of adapter {name!r} is a number, not a tensor as PEFT's hot-swapping makes it, "
                "which is for plain LoRA only; hot-swap what increlora_rs.export_lora writes."
            )
        scale = self._scales[name]
        scale.factor = value / self._unscaled(name)
        scale.tensor.fill_(scale.factor)

    def __delitem__(self, name: str) -> None:
        del self._scales[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scales)

    def __len__(self) -> int:
        return len(self._scales)

    def __repr__(self) -> str:
        return repr(dict(self))

    def copy(self) -> Scales:
        """The scales of the same layer as they are now, with tensors of their own."""
        other = Scales(self._layer)
        for name, scale in self._scales.items():
            other._scales[name] = _Scale(**(vars(scale) | {"tensor": scale.tensor.clone()}))
        return other
