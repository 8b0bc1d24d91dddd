"""What each component of a trained LoRA does: singular values of s B A C^(1/2), C the inputs' second moments.

Their squares are the eigenvalues of s^2 (B^T B) E[z z^T] with z = A x, of r numbers: the energy of what a
component adds to the module's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from increlora_rs.support.names import short
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

_ADAPTER = "default"


def component_energies(model: nn.Module, observe: Callable[[nn.Module], None]) -> dict[str, list[float]]:
    """Energies of the components of each module, descending, a mean over tokens.

    Args:
        model: With a LoRA adapter.
        observe: Passes data through it.
    """
    layers = {
        short(name): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and _ADAPTER in layer.lora_A
    }
    moments: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: Any, z: Tensor) -> None:
            rows = z.detach().reshape(-1, z.shape[-1]).double()
            moments[name] = moments.get(name, 0) + rows.T @ rows
            counts[name] += len(rows)

        return add

    handles = [layer.lora_A[_ADAPTER].register_forward_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        observe(model)
    for handle in handles:
        handle.remove()
    return {
        name: energies(layer.lora_B[_ADAPTER].weight, layer.scaling[_ADAPTER], moments[name] / counts[name])
        for name, layer in layers.items()
    }


def energies(b: Tensor, scale: float, moment: Tensor) -> list[float]:
    """Eigenvalues of scale^2 B^T B M, descending.

    Args:
        b: B, (out, r).
        moment: M, the second moments of A x, (r, r).
    """
    gram = b.detach().double().T @ b.detach().double()
    values, vectors = torch.linalg.eigh(moment.double())
    root = vectors * values.clamp(min=0.0).sqrt()
    # Symmetric, with the eigenvalues of the product.
    found = torch.linalg.eigvalsh(root.T @ gram @ root) * scale**2
    return found.clamp(min=0.0).flip(0).tolist()
