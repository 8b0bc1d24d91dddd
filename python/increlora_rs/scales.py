"""The scales of a layer's adapters, as numbers and as tensors."""

from __future__ import annotations

import torch
from torch import Tensor


class Scales(dict[str, float]):
    """The scale by adapter name; ``tensors`` holds the same numbers, float64 (1) on the CPU.

    A tensor keeps its identity when its scale changes, so a compiled graph can read it. (A scalar would be
    read as a number when the graph is made.)
    """

    def __init__(self, scales: dict[str, float] | None = None) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        for name, scale in (scales or {}).items():
            self[name] = scale

    def __setitem__(self, name: str, scale: float) -> None:
        if isinstance(scale, Tensor):
            raise ValueError(
                f"the scale of adapter {name!r} is a number, not a tensor as PEFT's hot-swapping makes it, "
                "which is for plain LoRA only; hot-swap what increlora_rs.export_lora writes."
            )
        super().__setitem__(name, scale)
        if name in self.tensors:
            self.tensors[name].fill_(scale)
        else:
            self.tensors[name] = torch.tensor([scale], dtype=torch.float64, device="cpu")

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self.tensors[name]

    def copy(self) -> Scales:
        """A copy with tensors of its own."""
        return Scales(self)

    def __reduce__(self) -> tuple[type[Scales], tuple[dict[str, float]]]:
        return Scales, (dict(self),)
