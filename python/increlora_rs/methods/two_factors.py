"""A and B, drawn as LoRA draws them, and nothing beside them that is trained: what three methods share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..contract.structure import Structure
from ..support.sites import Site


class TwoFactors(Structure):
    """``lora_A`` and ``lora_B``, of any shapes; a subclass says which, and what update they make."""

    names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def draw(
        self, site: Site, rank: int, config: Any, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """A Kaiming uniform over its last dimension and B 0; with ``init_lora_weights=False`` B as A."""
        # A generator is of the CPU; without one, the default device holds (meta while loading).
        device = None if generator is None else generator.device
        shapes = self.shapes(site, rank, config)
        a, b = torch.empty(shapes["lora_A"], device=device), torch.zeros(shapes["lora_B"], device=device)
        # By torch's own function: to the last bit what LoRA draws.
        nn.init.kaiming_uniform_(a.view(-1, a.shape[-1]), math.sqrt(5.0), generator=generator)
        if config.init_lora_weights is False:
            bound = 1.0 / math.sqrt(a.shape[-1])
            b.uniform_(-bound, bound, generator=generator)
        return {"lora_A": a, "lora_B": b}

    def first_learners(self, site: Site, config: Any) -> tuple[str, ...]:
        """B, as long as it is 0."""
        return ("lora_B",) if config.init_lora_weights else ()

    def rank_of(self, parameters: Mapping[str, Tensor]) -> int:
        """Rows of A."""
        return parameters["lora_A"].shape[0]
