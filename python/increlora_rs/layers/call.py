"""Whether calling a module is its class's own forward and nothing else: only then may an operation stand for
the call, or write into what it returns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

_Function = Callable[..., Any]
# The forward of a class, and the function that it calls by a name in a namespace; None where it was replaced.
_Known = tuple[_Function | None, dict[str, Any], str, _Function | None]


def _own(owner: Any, name: str, home: ModuleType) -> _Function | None:
    """``owner.name`` if it is the one that ``home`` defines, or C++ does; None if it was replaced."""
    function: _Function = getattr(owner, name)
    if isinstance(function, FunctionType):
        return (
            function if function.__globals__ is vars(home) and not hasattr(function, "__wrapped__") else None
        )
    return function if isinstance(function, BuiltinFunctionType) else None


def _known(kind: type[nn.Module], namespace: ModuleType, name: str) -> _Known:
    forward = _own(kind, "forward", sys.modules[kind.__module__])
    return forward, vars(namespace), name, _own(namespace, name, functional)


_KNOWN: dict[type[nn.Module], _Known] = {
    nn.Linear: _known(nn.Linear, functional, "linear"),
    Conv1D: _known(Conv1D, torch, "addmm"),
    nn.Embedding: _known(nn.Embedding, functional, "embedding"),
    nn.Conv1d: _known(nn.Conv1d, functional, "conv1d"),
    nn.Conv2d: _known(nn.Conv2d, functional, "conv2d"),
    nn.Conv3d: _known(nn.Conv3d, functional, "conv3d"),
}
_DROPOUTS = (nn.Dropout, nn.Identity)
_CALL = _own(nn.Module, "__call__", torch_module)
_CALL_IMPL = _own(nn.Module, "_call_impl", torch_module)


def is_plain_call(module: nn.Module) -> bool:
    """Would ``module(x)`` run what torch (or Transformers) wrote for its class, and nothing before, after or
    in place of it?

    Looked up in each call, as ``torch.nn.Module`` looks for hooks: what is put on a module, a class or torch
    can be taken off again.
    """
    kind = type(module)
    known = _KNOWN.get(kind)
    if known is None:
        # A subclass, a quantised layer, a parametrised one, another adapter.
        return False
    if (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return False
    # What somebody put on the module itself, accelerate's hooks and `module.compile()` among them.
    own = module.__dict__
    if "_call_impl" in own or "_conv_forward" in own or "_compiled_call_impl" in own:
        return False
    forward, namespace, name, function = known
    return (
        ("forward" not in own or _is_method(own["forward"], forward, module))
        and kind.forward is forward
        and (kind.__call__ is _CALL or _is_exports(kind.__call__))
        and kind._call_impl is _CALL_IMPL
        and namespace[name] is function
    )


def _is_exports(call: Any) -> bool:
    # torch.export without strict=True notes each call by a function of its own, and changes nothing by it.
    namespace = getattr(call, "__globals__", {})
    return torch.compiler.is_exporting() and namespace.get("__name__") == "torch.fx._symbolic_trace"


def drops_plainly(dropout: nn.Module) -> bool:
    """Is it the dropout that the configuration made, without hooks, so that an operation may do its work?"""
    return type(dropout) in _DROPOUTS and not (
        dropout._forward_pre_hooks
        or dropout._forward_hooks
        or dropout._backward_hooks
        or dropout._backward_pre_hooks
        or "forward" in dropout.__dict__
    )


def _is_method(value: Any, function: _Function | None, module: nn.Module) -> bool:
    # accelerate puts a layer's own method back on the layer when it takes its hooks off.
    return getattr(value, "__func__", None) is function and value.__self__ is module
