"""One factor of one adapter, under the name that LoRA gives it: ``lora_A.default.weight``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Factor(nn.Module):
    """A matrix that is trained, as ``weight``; it has no forward pass of its own.

    It reads as its parameter, too: attributes that a module has not are the parameter's (``shape``, ``grad``,
    ``detach()``), and it is the same key, so ``optimizer.state[layer.lora_A["default"]]`` is the parameter's.
    Scripts written for LoRA take ``lora_A["default"].weight``, and those written when the entries were
    parameters themselves go on.

    Args:
        weight: The first values, (rows, columns).
    """

    weight: nn.Parameter

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # "weight" is missing while a copy is being made.
            if name == "weight" or name.startswith("__"):
                raise
            return getattr(self.weight, name)

    def __eq__(self, other: object) -> bool:
        return self is other or self._parameters.get("weight") is other

    def __hash__(self) -> int:
        # A tensor's hash; without a parameter, as while a copy is being made, the module's own.
        return id(self.__dict__.get("_parameters", {}).get("weight", self))

    def extra_repr(self) -> str:
        """The shape."""
        return f"{tuple(self.weight.shape)}"
