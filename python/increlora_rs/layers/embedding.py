"""Adapted ``nn.Embedding``."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..ops.embedding import embedding, show_gradient_of
from ..ops.update import Call
from ..support.sites import Site
from .base import AdaptedLayer
from .shown import of_base


class Embedding(AdaptedLayer):
    """A frozen ``nn.Embedding``, integers (...) to (..., out): in is the number of embeddings.

    As in LoRA, A starts at 0 and B random, and nothing is dropped. An embedding that shares its weight
    with another module is adapted by itself.
    """

    kind: ClassVar[str] = "embedding"

    num_embeddings = of_base("num_embeddings")
    embedding_dim = of_base("embedding_dim")
    padding_idx = of_base("padding_idx")
    # Of Transformers' embeddings that scale what they look up.
    embed_scale = of_base("embed_scale")

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        if base_layer.max_norm is not None:
            raise ValueError(
                f"the embedding has max_norm={base_layer.max_norm}, which changes its frozen weight in every "
                "forward pass; leave it out of target_modules."
            )
        super().__init__(base_layer, *args, **kwargs)

    def _site(self, name: str) -> Site:
        padding = self.get_base_layer().padding_idx
        return Site(name, "embedding", self.out_features, self.in_features, padding)

    def _as_weight(self, delta: Tensor) -> Tensor:
        return delta.t()

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The base weight as the matrix (out, in)."""
        return weight.t()

    def _added(self, y: Tensor, x: Tensor, name: str, *, inplace: bool) -> Tensor:
        base = self.get_base_layer()
        low_rank: Any = self.update_in_use(name, x)
        # Nothing is dropped from whole numbers.
        call = Call(0.0, self.probes[name], self.slots[name], inplace)
        # Models like Gemma scale what they look up.
        factor = self._get_embed_scale()
        if low_rank.is_empty:
            left: Tensor = low_rank.leave(y, x, call, show_gradient_of(base, factor))
            return left
        update = embedding(
            x, low_rank, call, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq
        )
        if factor is not None:
            update = update * factor.to(update.dtype)
        return y.add_(update) if inplace else (y + update).to(y.dtype)
