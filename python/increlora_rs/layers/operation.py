"""Subclasses of torch's layers that compute something else than their class does: embeddings of positions,
convolutions that pad by themselves, layers that normalise their weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..support.warning import warn

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Half precision rounds, and what is meant here differs by far more.
_TOLERANCE = 0.02


def check_operation(base: nn.Module) -> None:
    """Calls a layer whose class has a ``forward`` of its own on a small input, to see what it computes. Warns
    where merging an update into its weight would be something else than adding it to what comes out.

    Where that cannot be told, for there are no numbers or the call wants other arguments, nothing is said.

    Raises:
        ValueError: what comes out has another shape than what torch's class gives, or an embedding looks up
            something else: there is no update of it at all.
    """
    kind = next((kind for kind in _OPERATIONS if isinstance(base, kind)), None)
    if kind is None or not _is_own(base, kind) or not _has_numbers(base):
        return
    found = _both(base, *_OPERATIONS[kind])
    if found is None or _alike(*found):
        return
    given, wanted = found
    what = f"a {type(base).__name__} does not compute of its input what a {kind.__name__} does"
    if kind is nn.Embedding or not isinstance(given, Tensor) or given.shape != wanted.shape:
        raise ValueError(
            f"{what}: it may look up something else, or pad. An update of its weight cannot be told from its "
            "input; leave it out of target_modules, by exclude_modules if need be."
        )
    warn(
        f"target_modules: {what}. An update is added to what comes out; merged into the weight it would act "
        "otherwise. Do not merge it, or leave it out by exclude_modules."
    )


def _is_own(base: nn.Module, kind: type[nn.Module]) -> bool:
    names = ("forward", "_conv_forward")
    return any(getattr(type(base), name, None) is not getattr(kind, name, None) for name in names)


def _has_numbers(base: nn.Module) -> bool:
    weight: Any = base.weight
    # A tensor of another class may be quantised, or a part of a matrix.
    plain = type(weight) in (nn.Parameter, Tensor) and weight.dtype in _FLOATING
    return plain and not weight.is_meta and weight.numel() > 1


def _both(
    base: nn.Module, inputs: Callable[[Any], Tensor], operation: Callable[[Any, Tensor], Tensor]
) -> tuple[Any, Tensor] | None:
    """What the layer and the operation make of an input; None where one of them fails."""
    mode, base.training = base.training, False
    try:
        with torch.no_grad():
            x = inputs(base)
            # Not the call: it has hooks, and those of accelerate.
            return type(base).forward(base, x), operation(base, x)
    except Exception:
        # It wants other arguments, or there is no such operation in this dtype.
        return None
    finally:
        base.training = mode


def _alike(given: Any, wanted: Tensor) -> bool:
    if not isinstance(given, Tensor) or given.shape != wanted.shape:
        return False
    difference = (given.double() - wanted.double()).norm()
    return bool(difference <= _TOLERANCE * wanted.double().norm())


def _numbers(base: nn.Module, *shape: int) -> Tensor:
    weight: Any = base.weight
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(weight.device, weight.dtype)


def _row(base: Any) -> Tensor:
    return _numbers(base, 1, base.weight.shape[0 if isinstance(base, Conv1D) else 1])


def _ids(base: Any) -> Tensor:
    # Two that are no places from 0 on; few, for an embedding of positions may take them for a mask.
    return torch.tensor([[min(1, base.num_embeddings - 1), 0]], device=base.weight.device)


def _image(base: Any) -> Tensor:
    sizes = [
        dilation * (size - 1) + stride + 1
        for size, stride, dilation in zip(base.kernel_size, base.stride, base.dilation, strict=True)
    ]
    return _numbers(base, 1, base.in_channels, *sizes)


def _looked_up(base: Any, x: Tensor) -> Tensor:
    found = functional.embedding(x, base.weight)
    # As PEFT reads the scale of such an embedding.
    scale = getattr(base, "embed_scale", None)
    return found if scale is None else found * scale


def _convolved(kind: Any) -> Callable[[Any, Tensor], Tensor]:
    return lambda base, x: kind._conv_forward(base, x, base.weight, base.bias)


_OPERATIONS: dict[type[nn.Module], tuple[Callable[[Any], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    nn.Linear: (_row, lambda base, x: functional.linear(x, base.weight, base.bias)),
    Conv1D: (_row, lambda base, x: functional.linear(x, base.weight.t(), base.bias)),
    nn.Embedding: (_ids, _looked_up),
    nn.Conv1d: (_image, _convolved(nn.Conv1d)),
    nn.Conv2d: (_image, _convolved(nn.Conv2d)),
    nn.Conv3d: (_image, _convolved(nn.Conv3d)),
}
