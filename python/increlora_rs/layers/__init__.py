"""The adapted layers: one class for each kind of module that can be adapted."""

from __future__ import annotations

from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .base import AdaptedLayer
from .convolution import Convolution
from .embedding import Embedding
from .linear import Linear, TransposedLinear
from .weight import quantization_of

__all__ = [
    "AdaptedLayer",
    "Convolution",
    "Embedding",
    "Linear",
    "TransposedLinear",
    "layer_class",
    "quantization_of",
]

_CLASSES: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], type[AdaptedLayer]], ...] = (
    (nn.Linear, Linear),
    (Conv1D, TransposedLinear),
    (nn.Embedding, Embedding),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), Convolution),
)


def layer_class(base: nn.Module, quantization: QuantizationBackend | None = None) -> type[AdaptedLayer]:
    """The class that adapts ``base``.

    Raises:
        ValueError: there is none.
    """
    # The output projection of nn.MultiheadAttention: its weight is used without calling it.
    if not isinstance(base, NonDynamicallyQuantizableLinear):
        if quantization is not None:
            return Linear
        for modules, adapted in _CLASSES:
            if isinstance(base, modules):
                return adapted
    raise ValueError(
        f"a module of type {type(base).__name__} is not supported; torch.nn.Linear, Embedding, Conv1d, "
        "Conv2d and Conv3d are, Conv1D of transformers, and quantised linear layers that PEFT knows."
    )
