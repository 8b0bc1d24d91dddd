"""Changing the weight of a base layer, plain or quantised, for merging."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    resolve_quantization_backend,
)
from torch import Tensor, nn

from ..support.warning import warn
from .offload import hook_of
from .requantised import Former, set_weight, weight_of

# Formats whose modules compute ``W x + bias`` and nothing else.
_LINEAR_BACKENDS = frozenset({"bnb 8bit", "bnb 4bit", "hqq", "torchao", "aqlm", "eetq", "gptq", "awq", "inc"})


def quantization_of(base: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """PEFT's access to the weight of a quantised linear layer; None for every other module.

    Args:
        base: The module.
        kwargs: What ``peft.utils.quantization_utils.get_quantization_kwargs`` gives for the model.
    """
    try:
        backend = resolve_quantization_backend(base, **kwargs)
    except ValueError:
        # torchao's weight in a model that does not say how it was quantised, so that it can be used as
        # it is but not be quantised anew.
        return ForwardOnlyQuantizationBackend("torchao")
    return backend if backend is not None and backend.backend_name in _LINEAR_BACKENDS else None


def is_plain(weight: Any) -> bool:
    """Is this a torch tensor itself, no subclass that keeps its numbers elsewhere?"""
    return type(weight) in (nn.Parameter, Tensor)


def numbers_of(base: nn.Module, quantization: QuantizationBackend | None) -> Tensor:
    """The weight of ``base`` in floating point, dequantised where it is not.

    Raises:
        ValueError: its library cannot give it.
    """
    weight: Any = getattr(base, "weight", None)
    if quantization is None or getattr(weight, "has_fp16_weights", False):
        plain: Tensor = weight
        return plain
    if quantization.backend_name == "torchao":
        # Its tensors know by themselves, also where the model does not say how they were made.
        known: Tensor = weight.dequantize()
        return known
    restore_layout(base)
    return weight_of(quantization, base)


def restore_layout(base: nn.Module) -> None:
    """Takes a 4-bit weight of bitsandbytes out of the layout that an evaluation on some CPUs gives it, which
    passes no gradient on and cannot be dequantised; only a look at the state undoes it."""
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        base.state_dict()


def changed_weight(
    layer: BaseTunerLayer,
    quantization: QuantizationBackend | None,
    delta: Tensor,
    adapter_name: str,
    *,
    check_finite: bool = False,
) -> Former | None:
    """Adds ``delta``, of the shape of the base weight of ``layer``, to it; also where that is offloaded.

    Returns:
        What a quantised base layer held before; None for every other one.

    Raises:
        ValueError: the weight cannot be changed, or, with ``check_finite``, the result is not finite.
    """
    base: nn.Module = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta and not delta.is_meta and hook_of(base) is not None:
        with onload_layer(layer):
            return _change(quantization, base, delta, adapter_name, check_finite=check_finite)
    return _change(quantization, base, delta, adapter_name, check_finite=check_finite)


def check_finite_sum(weight: Tensor, delta: Tensor, adapter_name: str) -> None:
    """Raises ValueError where ``weight`` with ``delta`` of an adapter in it would not be finite."""
    if not torch.isfinite(weight + delta.to(weight.device)).all():
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: some of "
            "them are not finite. Merge without it, or load an earlier checkpoint of it."
        )


def _change(
    quantization: QuantizationBackend | None,
    base: nn.Module,
    delta: Tensor,
    adapter_name: str,
    *,
    check_finite: bool,
) -> Former | None:
    weight: Any = getattr(base, "weight", None)
    # bitsandbytes' layer of 8 bits may keep its numbers and quantise them at each call.
    in_full = getattr(weight, "has_fp16_weights", False)
    backend = None if in_full else quantization
    if backend is None and not ((in_full or is_plain(weight)) and weight.is_floating_point()):
        _refuse(adapter_name, type(weight).__name__, getattr(weight, "dtype", None))
    if backend is not None and not backend.supports_merge:
        _refuse(adapter_name, backend.backend_name, getattr(weight, "dtype", None))
    if backend is None and base._parameters.get("weight") is not weight:
        raise ValueError(
            f"adapter {adapter_name!r} cannot be merged into the weight of a {type(base).__name__} that is "
            "computed from other parameters (pruned, or parametrised); make it permanent before, by "
            "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations."
        )
    if backend is None and weight.is_meta and not delta.is_meta:
        raise ValueError(
            f"adapter {adapter_name!r} cannot be merged into a base weight on the device 'meta', which holds "
            "no numbers; load the base model whole to merge."
        )
    restore_layout(base)
    old = weight.data if backend is None else weight_of(backend, base)
    if check_finite:
        check_finite_sum(old, delta, adapter_name)
    if backend is None:
        weight.data += delta.to(weight.dtype)
        if in_full:
            # What the last call made of the old numbers.
            base.state.reset_grads()  # type: ignore[operator, union-attr]
        return None
    warn(
        f"the {backend.backend_name} weight of a {type(base).__name__} is quantised anew with the update of "
        f"adapter {adapter_name!r} in it, and the outputs change by the rounding"
    )
    return set_weight(backend, base, (old.to(delta.dtype) + delta).to(old.dtype))


def _refuse(adapter_name: str, what: str, dtype: Any) -> None:
    raise ValueError(
        f"adapter {adapter_name!r} cannot be merged into a base weight of type {what}, dtype {dtype}; load "
        "the base model unquantised, and whole, to merge."
    )
