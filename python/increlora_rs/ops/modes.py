"""Who else takes part in an operation: modes that see or replace it, and tensors that are no plain memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._device import DeviceContext

# torch has no public name for these: what its own modules ask in every call.
_C: Any = torch._C
_PLAIN = (nn.Parameter, Tensor)
# What torch.compile and torch.export trace with.
_TRACED = (*_PLAIN, FakeTensor)


def watched() -> bool:
    """Does a mode of torch's see the operations that run now, or put others in their place?

    A ``TorchDispatchMode`` (fake tensors, counting of operations, selective checkpointing), a
    ``TorchFunctionMode`` or a transform of ``torch.func``. While torch.compile traces it takes care of them.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(
        _C._len_torch_dispatch_stack()
        or _C._are_functorch_transforms_active()
        or (_C._len_torch_function_stack() and _function_mode())
    )


def transformed() -> bool:
    """Is this inside a transform of ``torch.func``, as ``vmap`` and ``grad``?"""
    return bool(_C._are_functorch_transforms_active())


def _function_mode() -> bool:
    # A default device is a mode as well, and changes nothing of what has a device already.
    depth = _C._len_torch_function_stack()
    return any(type(_C._get_function_stack_at(i)) is not DeviceContext for i in range(depth))


def in_memory(tensor: Tensor) -> bool:
    """Do its numbers lie where its strides say? Not those of subclasses (quantised, sharded, fake), of
    nested and sparse tensors, nor those that there are none of (meta)."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_meta
    )


def readable(*tensors: Tensor) -> bool:
    """May an operation of Rust's read these tensors, and nobody else wants to see what it does?"""
    if torch.compiler.is_compiling():
        return all(type(tensor) in _TRACED for tensor in tensors)
    return not watched() and all(in_memory(tensor) for tensor in tensors)
