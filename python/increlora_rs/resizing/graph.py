"""One compiled graph for all ranks: torch.compile is told which sizes change, and where not to look."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import meta_utils
from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

# Names by which torch.compile knows the adapter's parameters, and the dimension of their rows. Without
# them it takes the shape of every parameter for fixed, whatever is marked.
_GROWING = tuple(
    rf".*\['lora_{factor}'\].*\['weight'\]:{dim}" for factor, dim in (("A", 0), ("B", 1), ("E", 0))
)


_safe_grad = meta_utils.safe_grad


def mark_growing(parameter: nn.Parameter, dim: int) -> None:
    """Has torch.compile make graphs for any size of ``parameter`` along ``dim``."""
    config = torch.compiler.config
    known = [source for source in config.dynamic_sources.split(",") if source]
    if not set(_GROWING) <= set(known):
        config.dynamic_sources = ",".join(dict.fromkeys([*known, *_GROWING]))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # It splits a graph by the sizes of parameters, and fails on those that it does not know.
        torch._dynamo.config.optimize_ddp = False
    torch._dynamo.decorators.mark_unbacked(parameter, dim)
    _hide_gradients()


def _hide_gradients() -> None:
    """Has torch.compile not look at gradients of such parameters where it looks at the parameters.

    It would take a gradient's size for another that it does not know, and fail: in the second of accumulated
    micro-batches, wherever it compiles anew. Code that reads ``.grad`` finds it as before.
    """
    if meta_utils.safe_grad is not _visible_gradient:
        meta_utils.safe_grad = _visible_gradient  # type: ignore[assignment]


def _visible_gradient(tensor: Tensor) -> Tensor | None:
    return None if hasattr(tensor, "_dynamo_unbacked_indices") else _safe_grad(tensor)


def is_zero(size: int) -> bool:
    """``size == 0``; False too where a graph is made that does not know it."""
    if torch.compiler.is_compiling():
        return guard_or_false(size == 0)
    return size == 0


def may_differ(size: int, other: int) -> bool:
    """``size != other``; True too where a graph is made that does not know them."""
    if torch.compiler.is_compiling():
        return guard_or_true(size != other)
    return size != other
