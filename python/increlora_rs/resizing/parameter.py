"""A parameter that changes its size and stays the same object, for whatever holds it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .optimizer_state import watch


def append(parameter: nn.Parameter, rows: Tensor, dim: int) -> None:
    if rows.shape[dim]:
        rows = rows.to(device=parameter.device, dtype=parameter.dtype)
        resize(parameter, torch.cat([parameter.detach(), rows], dim))


def select(parameter: nn.Parameter, keep: Sequence[int], dim: int) -> None:
    """Keeps the rows ``keep``, in that order."""
    index = torch.tensor(list(keep), dtype=torch.int64, device=parameter.device)
    resize(parameter, parameter.detach().index_select(dim, index), moved=True)


def resize(parameter: nn.Parameter, value: Tensor, *, moved: bool = False) -> None:
    """Gives ``parameter`` the memory of ``value``, which nobody else may use. ``moved``: may other rows stand
    where some did?"""
    # `set_` also drops autograd's accumulator for the old shape; assigning `.data` would keep it.
    with torch.no_grad():
        # torch's stub has no overload for a tensor.
        parameter.set_(value)  # type: ignore[call-overload]
    parameter.grad = None
    watch(parameter, moved=moved)
