"""DoRA's magnitudes in the files of adapters: under PEFT's names, one vector (out) a module."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..contract.structure import SizeMismatchError, check_finite
from ..layers import AdaptedLayer
from ..layers.dora import MAGNITUDE
from ..layers.offload import onloaded
from ..support.names import as_saved


def magnitude_key(name: str, adapter_name: str) -> str:
    """The key of the magnitudes of module ``name`` in a model's ``state_dict``."""
    return f"{as_saved(name)}.{MAGNITUDE}.{adapter_name}.weight"


def saved_magnitude_key(name: str, adapter_name: str) -> str:
    """The same as PEFT saves it: from a time when they were a parameter of the layer."""
    return magnitude_key(name, adapter_name).removesuffix(".weight")


def magnitude_to_save(name: str, layer: AdaptedLayer, adapter_name: str, found: Tensor) -> Tensor:
    """What is saved of the magnitudes of module ``name``.

    Args:
        found: What a ``state_dict`` has of them.

    Raises:
        ValueError: it is a part of them, as another process has the rest.
    """
    held = layer.magnitude(adapter_name)
    if found.is_meta and held is not None:
        with onloaded(held):
            found = held.weight.detach()
    if found.shape != (layer.out_features,):
        raise ValueError(
            f"the adapter of module {name!r} cannot be saved: {MAGNITUDE} has shape {tuple(found.shape)} in "
            f"this process, and not ({layer.out_features},), as part of a parameter that DeepSpeed ZeRO-3 or "
            "FSDP has split. Gather the parameters, as accelerator.get_state_dict(model) does, and give them "
            "to save_pretrained as state_dict."
        )
    return found


def settle_magnitudes(layers: Iterable[AdaptedLayer], adapter_name: str) -> None:
    """The adapter is made, and cast to the dtype that it is to have."""
    for layer in layers:
        held = layer.magnitude(adapter_name)
        if held is not None:
            held.settle()


def check_magnitude(name: str, layer: AdaptedLayer, found: Tensor | None, key: str) -> None:
    """Raises unless ``found`` can be the magnitudes of module ``name``.

    Raises:
        SizeMismatchError: the shape is wrong.
        ValueError: there are none, or a number is not finite.
    """
    if found is None:
        raise ValueError(
            f"the adapter has no tensor {key!r} for the adapted module {name!r}, whose configuration has "
            "use_dora=True; it was saved with use_dora=False, or from another base model."
        )
    if found.shape != (layer.out_features,):
        raise SizeMismatchError(
            f"size mismatch: {MAGNITUDE} of module {name!r} has shape {tuple(found.shape)} in the adapter, "
            f"but the model needs ({layer.out_features},); the adapter was saved from another base model, or "
            "is damaged."
        )
    check_finite(name, {MAGNITUDE: found})
