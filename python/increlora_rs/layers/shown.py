"""Sizes and settings of a base layer that the module around it reads: Whisper's encoder the strides of its
convolutions, for example."""

from __future__ import annotations

from typing import Any


def of_base(name: str) -> property:
    """An attribute of an adapted layer that is its base layer's, to be read alone."""

    def read(layer: Any) -> Any:
        return getattr(layer.get_base_layer(), name)

    return property(read, doc=f"``{name}`` of the base layer.")
