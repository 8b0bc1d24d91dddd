"""What the tensors of an adapter have to be."""

from __future__ import annotations

import torch
from torch import Tensor


class SizeMismatchError(ValueError, RuntimeError):
    """Tensors do not fit the model: bad input to this library, and a RuntimeError where torch tells it."""


def check_factors(name: str, a: Tensor, b: Tensor, e: Tensor, in_features: int, out_features: int) -> None:
    """Raises ValueError unless A, B, E are finite and fit a module of the given size."""
    check_shapes(name, a, b, e, in_features, out_features)
    for factor, tensor in (("lora_E", e), ("lora_A", a), ("lora_B", b)):
        if tensor.device.type != "meta" and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{factor} of module {name!r} holds {bad} values that are NaN or infinite; the adapter "
                "is damaged, or its training diverged: take an earlier checkpoint."
            )


def check_shapes(name: str, a: Tensor, b: Tensor, e: Tensor, in_features: int, out_features: int) -> None:
    """Raises ValueError unless A, B, E of an adapter fit each other and a module of the given size."""
    rank = e.shape[0] if e.dim() else 0
    for factor, tensor, want in (
        ("lora_E", e, (rank, 1)),
        ("lora_A", a, (rank, in_features)),
        ("lora_B", b, (out_features, rank)),
    ):
        if tuple(tensor.shape) != want or rank < 1:
            raise SizeMismatchError(
                f"size mismatch: {factor} of module {name!r} has shape {tuple(tensor.shape)} in the adapter, "
                f"but the model needs {want}, with a rank of 1 or more; the adapter was saved from another "
                "base model, or is damaged."
            )
