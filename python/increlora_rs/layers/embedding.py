"""Adapted ``nn.Embedding``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..methods.increlora.config import IncreLoraConfig
from ..ops.embedding import embedding
from ..ops.update import Call, LowRank
from .base import AdaptedLayer


class Embedding(AdaptedLayer):
    """A frozen ``nn.Embedding``, integers (...) to (..., out): in is the number of embeddings.

    As in LoRA, A starts at 0 and B random, and nothing is dropped. An embedding that shares its weight
    with another module is adapted by itself.
    """

    kind: ClassVar[str] = "embedding"

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        if base_layer.max_norm is not None:
            raise ValueError(
                f"the embedding has max_norm={base_layer.max_norm}, which changes its frozen weight in every "
                "forward pass; leave it out of target_modules."
            )
        super().__init__(base_layer, *args, **kwargs)

    def _draw(
        self, adapter_name: str, n: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        a, b, e = super()._draw(adapter_name, n, generator)
        # The padding's embedding gets no gradient: where A were not 0 there, it would move with B.
        padding = self.get_base_layer().padding_idx
        if padding is not None:
            a[:, padding] = 0.0
        return a, b, e

    def _fill(self, a: Tensor, b: Tensor, config: IncreLoraConfig, generator: torch.Generator | None) -> None:
        if config.init_lora_weights is False:
            a.normal_(generator=generator)
        else:
            a.zero_()
        b.normal_(generator=generator)

    def _as_weight(self, delta: Tensor) -> Tensor:
        return delta.t()

    def _added(self, y: Tensor, x: Tensor, name: str, *, inplace: bool) -> Tensor:
        base = self.get_base_layer()
        update = embedding(
            x,
            LowRank(*self._factors_in_use(name, x), self._scale(name)),
            Call(0.0, self.probes[name], self.slots[name]),
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
        )
        # Models like Gemma scale what they look up.
        factor = self._get_embed_scale()
        if factor is not None:
            update = update * factor.to(update.dtype)
        return y.add_(update) if inplace else (y + update).to(y.dtype)
