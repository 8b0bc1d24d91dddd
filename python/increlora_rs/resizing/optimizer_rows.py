"""One tensor of an optimizer's state and its parameter's size: does it fit, and how does it follow?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .optimizer_starts import Entry


class CannotFollow(Exception):
    """Says why a tensor cannot be brought to its parameter's new size."""


@dataclass(frozen=True)
class Change:
    """A parameter that changed its size, or rows of which left it.

    Args:
        parameter: The parameter as it is now: rows that stayed, and new ones behind them.
        dim: The dimension along which it changed.
        rescaled: What its old rows were multiplied by.
        group: Its group in the optimizer.
        kept: The old positions of the rows that stayed, in order; None: all, cut off at the end.
    """

    parameter: Tensor
    dim: int
    rescaled: float
    group: Mapping[str, Any]
    kept: Sequence[int] | None = None

    def old_size(self, entry: Entry | None, value: Any) -> int | None:
        """The size that the parameter had when ``value`` was made; None: ``value`` has no rows.

        Raises:
            CannotFollow: ``value`` is nothing that can be given other rows.
        """
        if entry is None:
            raise CannotFollow("how it starts is not known")
        if entry.kind == "factor":
            raise CannotFollow("it holds numbers for whole rows and columns")
        if not _has_rows(entry, value, self.parameter):
            return None
        _require_plain(value)
        if _is_flat(entry, value, self.parameter):
            if int(self.group.get("slice_p", 1)) != 1:
                raise CannotFollow("it holds but some of the parameter's numbers (slice_p)")
            rest = math.prod(self._shape(1))
            if rest == 0 or value.numel() % rest:
                raise CannotFollow("it has no number for each of the parameter's")
            return value.numel() // rest
        lead = 1 if entry.kind == "stacked" else 0
        if value.dim() == self.parameter.dim() + lead:
            old = value.shape[self.dim + lead]
            if list(value.shape[lead:]) == self._shape(old):
                return int(old)
        raise CannotFollow("it has no number for each of the parameter's")

    def follow(self, entry: Entry, value: Tensor, old: int) -> Tensor:
        """``value`` at the present size, what stayed as it is.

        Raises:
            CannotFollow: how new rows start is not known under the group's settings, or ``value`` has not
                the rows that stayed.
        """
        kept = self._kept_of(old)
        scale = self.rescaled if entry.is_weights else 1.0
        if value.dim() == 0:
            return self._spread(entry, value, old)
        new = self.parameter.shape[self.dim] - len(kept)
        if len(kept) == old and new == 0 and scale == 1.0:
            return value
        flat = _is_flat(entry, value, self.parameter)
        rows = value.view(self._shape(old)) if flat else value
        along = self.dim + (1 if entry.kind == "stacked" else 0)
        if scale != 1.0:
            rows = rows * scale
        if len(kept) < old:
            rows = rows.index_select(along, self._places(len(kept)).to(rows.device))
        if new:
            start = self._start(entry, len(kept))
            if entry.kind == "stacked":
                start = start.expand(value.shape[0], *start.shape)
            rows = torch.cat([rows, start.to(device=rows.device, dtype=rows.dtype)], along)
        return rows.reshape(-1) if flat else rows

    def _spread(self, entry: Entry, value: Tensor, old: int) -> Tensor:
        """One number for weights that all are 0 (Prodigy's p0) becomes one each, where new ones are not."""
        kept = self._kept_of(old)
        if self.parameter.shape[self.dim] == len(kept):
            return value
        start = self._start(entry, len(kept))
        if not start.any():
            return value
        return self.follow(entry, value.expand(self._shape(old)).reshape(-1), old)

    def _kept_of(self, old: int) -> list[int]:
        if self.kept is None:
            return list(range(min(old, self.parameter.shape[self.dim])))
        if any(position >= old for position in self.kept):
            raise CannotFollow("it has not all of the rows that stayed")
        return list(self.kept)

    def _places(self, count: int) -> Tensor:
        """The old positions of the ``count`` rows that stayed."""
        return torch.arange(count) if self.kept is None else self._kept

    @cached_property
    def _kept(self) -> Tensor:
        # Each tensor of a parameter's state asks for it.
        return torch.tensor(self.kept, dtype=torch.int64)

    def _start(self, entry: Entry, first: int) -> Tensor:
        new = self.parameter.detach().narrow(self.dim, first, self.parameter.shape[self.dim] - first)
        start = None if entry.start is None else entry.start(new, self.group)
        if start is None:
            raise CannotFollow("how it starts is not known under these settings")
        return start

    def _shape(self, size: int) -> list[int]:
        shape = list(self.parameter.shape)
        return [*shape[: self.dim], size, *shape[self.dim + 1 :]]


def fits(entry: Entry | None, value: Any, parameter: Tensor) -> bool:
    """Can ``value`` be state of a parameter of this shape? Where nothing is known of it, it may be one
    number for a whole row or column, too."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return True
    if entry is None:
        return value.dim() != parameter.dim() or _is_broadcast(value, parameter)
    if entry.kind == "factor":
        return all(size == 1 or size in parameter.shape for size in value.shape)
    if not _has_rows(entry, value, parameter) or entry.kind == "flat":
        return not _is_flat(entry, value, parameter) or value.numel() <= parameter.numel()
    return value.shape[1 if entry.kind == "stacked" else 0 :] == parameter.shape


def is_of_rows(entry: Entry | None, value: Any) -> bool:
    """Can ``value`` hold numbers of single rows?"""
    whole = entry is not None and entry.kind in ("whole", "given")
    return isinstance(value, Tensor) and value.dim() > 0 and not whole


def _is_broadcast(value: Tensor, parameter: Tensor) -> bool:
    return all(size in (1, whole) for size, whole in zip(value.shape, parameter.shape, strict=True))


def _is_flat(entry: Entry, value: Tensor, parameter: Tensor) -> bool:
    return entry.kind == "flat" and value.dim() == 1 < parameter.dim()


def _has_rows(entry: Entry, value: Any, parameter: Tensor) -> bool:
    if entry.kind in ("whole", "given") or not isinstance(value, Tensor):
        return False
    if value.dim() == 0:
        return False
    # Where optimi does not need a key, one number holds its place.
    return not (entry.kind == "rows" and value.shape == (1,) and parameter.dim() > 1)


def _require_plain(value: Tensor) -> None:
    if type(value) is not Tensor:
        raise CannotFollow(f"it is a {type(value).__name__}")
    if value.layout is not torch.strided:
        raise CannotFollow(f"its layout is {value.layout}")
    if not value.is_floating_point():
        raise CannotFollow(f"it is quantised ({value.dtype})")
    if getattr(value, "is_paged", False):
        raise CannotFollow("it lies in paged memory")
