"""An update of a linear layer by a square matrix M between a fixed compression of x and a fixed decompression
to y, ``y + s decomp(M comp(drop(x)))`` (MoRA, arXiv 2405.12130, eq. 6; type 6, rotation, eq. 9).

Compression and decompression, by type, of vectors of d features and of q, the side of M:

    1  sums of the features i mod q          tile: output o takes o mod q
    2  sums of neighbours, q groups          each position repeated over its group
    3  sums of neighbours                    tile
    4  sums of the features i mod q          each position repeated over its group
    6  blocks of q features; block i is turned by the angles i theta_j, theta_j = 10000^(-2 j / q), as pairs
       (j, j + q/2), and multiplied by M; the blocks of outputs stand one behind the other

Where q does not divide d, the features of the last round (types 1, 4 and 6) are followed by the first ones
again; of groups of neighbours the first have one more. Outputs that are too many are cut, and where there are
too few, tiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import _core
from . import core_op
from .autocast import compute_dtype
from .device import stream
from .modes import readable
from .observed import observed
from .update import Call

ROTATION = 6
#: Which types sum neighbours, and which repeat over neighbours; the others go round.
_SUMS_NEIGHBOURS, _REPEATS_NEIGHBOURS = (2, 3), (2, 4)


@dataclass
class Square:
    """``s D M C``, or type 6.

    Args:
        m: M, (q, q).
        form: The type, 1, 2, 3, 4 or 6.
        out, features: Size of the module.
        scale: The scale s.
        fold: Of type 6: do blocks of inputs beyond the outputs' go to the first blocks again? Else they are
            ignored, as published.
    """

    m: Tensor
    form: int
    out: int
    features: int
    scale: float
    fold: bool = True

    def add(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        """``y`` (..., out) and the update of x (..., in); see :class:`increlora_rs.ops.update.Update`.

        Raises:
            ValueError: shapes or devices do not fit, or a number is out of range.
            TypeError: a dtype does not fit.
            NotImplementedError: the training has a gauge, to which this update shows nothing.
        """
        if torch.compiler.is_compiling() or not readable(y, x, self.m):
            return self._add_by_torch(y, x, call)
        return core_op.add(self._op(), y, x, call, self.m)

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor | None:
        """The layer and its update in one call; None in a graph, which fuses by itself. Raises as
        :meth:`add`."""
        if torch.compiler.is_compiling() or not readable(self.m):
            return None
        return core_op.with_base(self._op(), x, weight, bias, call, self.m)

    def dense(self) -> Tensor:
        """dW (out, in), float32 or wider."""
        m = self.m.to(torch.promote_types(self.m.dtype, torch.float32)) * self.scale
        if self.form == ROTATION:
            return self._rotated_dense(m)
        return self._decompressed(self._on_inputs(m).t()).t()

    def lora(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor] | None:
        """``M C`` (q, in) and ``s D`` (out, q), in ``dtype`` (None: float32 or wider); None for type 6, of
        which no product of thin matrices is the update."""
        if self.form == ROTATION:
            return None
        m = self.m.to(dtype or torch.promote_types(self.m.dtype, torch.float32))
        positions = torch.eye(m.shape[0], dtype=m.dtype, device=m.device)
        return self._on_inputs(m), self._decompressed(positions).t() * self.scale

    def _op(self) -> _Op:
        return _Op(self.form, self.out, self.scale, self.fold)

    def _add_by_torch(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        """For graphs, and for tensors of any kind."""
        dtype = compute_dtype(x)
        x = functional.dropout(x, call.dropout) if call.dropout > 0.0 else x
        update = self._of(x.to(dtype), self.m)
        return (y + observed(update, None, call.probe, call.slot)).to(y.dtype)

    def _of(self, x: Tensor, m: Tensor) -> Tensor:
        """The update of x (..., in), of its dtype."""
        m = m * self.scale
        if self.form == ROTATION:
            return self._rotated(x, m)
        return self._decompressed(self._compressed(x, m.shape[0]) @ m.to(x.dtype).t())

    def _compressed(self, x: Tensor, side: int) -> Tensor:
        if self.form in _SUMS_NEIGHBOURS:
            parts = _groups(self.features, side)
            return torch.cat(
                [x[..., start:end].unflatten(-1, (count, -1)).sum(-1) for start, end, count in parts]
                + [x.new_zeros(*x.shape[:-1], side - sum(count for _, _, count in parts))],
                -1,
            )
        return _whole_rounds(x, side).unflatten(-1, (-1, side)).sum(-2)

    def _decompressed(self, t: Tensor) -> Tensor:
        return _repeated(t, self.out) if self.form in _REPEATS_NEIGHBOURS else _tiled(t, self.out)

    def _on_inputs(self, m: Tensor) -> Tensor:
        """``M C`` (q, in): of every input the column of M that it goes to, or their sum."""
        side = m.shape[1]
        if self.form in _SUMS_NEIGHBOURS:
            return _repeated(m, self.features)
        return _folded(_tiled(m, -(-self.features // side) * side), self.features)

    def _rotated(self, x: Tensor, m: Tensor) -> Tensor:
        side, outs = m.shape[0], -(-self.out // m.shape[0])
        turned = self._turned(m).to(x.dtype)
        x = _whole_rounds(x, side).unflatten(-1, (len(turned), side))
        z = torch.einsum("...bi,boi->...bo", x, turned).flatten(-2)
        return _tiled(_folded(z, outs * side) if self.fold else z, self.out)

    def _rotated_dense(self, m: Tensor) -> Tensor:
        side, outs = m.shape[0], -(-self.out // m.shape[0])
        turned = self._turned(m)
        whole = m.new_zeros(min(len(turned), outs) * side, len(turned) * side)
        for number, block in enumerate(turned if self.fold else turned[:outs]):
            row, column = number % outs * side, number * side
            whole[row : row + side, column : column + side] = block
        return _tiled(_folded(whole, self.features).t(), self.out).t()

    def _turned(self, m: Tensor) -> Tensor:
        """``M R_i`` of every block of inputs, (blocks, q, q)."""
        side = m.shape[0]
        tables = _angles(side, -(-self.features // side), m.dtype, m.device)
        cos, sin = (table.unsqueeze(1) for table in tables)
        first, second = m[:, : side // 2], m[:, side // 2 :]
        return torch.cat([cos * first + sin * second, cos * second - sin * first], -1)


def _groups(size: int, side: int) -> list[tuple[int, int, int]]:
    """The larger and the smaller groups of neighbours of ``size`` features: start, end, number of groups;
    those without a feature are left out."""
    small = size // side
    larger = size - side * small
    middle = larger * (small + 1)
    parts = [(0, middle, larger), (middle, size, side - larger if small else 0)]
    return [part for part in parts if part[2]]


def _repeated(t: Tensor, size: int) -> Tensor:
    """Each position of ``t`` (..., q) over its group of ``size`` neighbours."""
    repeated, first = [], 0
    for start, end, count in _groups(size, t.shape[-1]):
        positions = t[..., first : first + count, None]
        repeated.append(positions.expand(*t.shape[:-1], count, (end - start) // count).flatten(-2))
        first += count
    return torch.cat(repeated, -1)


def _whole_rounds(x: Tensor, side: int) -> Tensor:
    """``x`` with its first features again behind it, so that ``side`` divides their number."""
    return _tiled(x, -(-x.shape[-1] // side) * side)


def _tiled(t: Tensor, size: int) -> Tensor:
    """``t`` over and over, cut to ``size``."""
    times = -(-size // t.shape[-1])
    return torch.cat([t] * times, -1)[..., :size]


def _folded(t: Tensor, size: int) -> Tensor:
    """The transpose of :func:`_tiled`: pieces of ``size``, the last one maybe shorter, added up."""
    first, *more = t.split(size, -1)
    for part in more:
        first = first + functional.pad(part, (0, first.shape[-1] - part.shape[-1]))
    return first


def _angles(side: int, blocks: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of every block, (blocks, side / 2)."""
    places = torch.arange(side // 2, dtype=torch.float64, device=device)
    numbers = torch.arange(blocks, dtype=torch.float64, device=device)
    angles = numbers.unsqueeze(1) * 10000.0 ** (-2.0 * places / side)
    return angles.cos().to(dtype), angles.sin().to(dtype)


# One pair of tables a size, dtype and device: they depend on nothing else.
_kept_angles = lru_cache(maxsize=64)(_angles)


@dataclass(frozen=True)
class _Op:
    """The calls into Rust."""

    form: int
    out: int
    scale: float
    fold: bool

    @property
    def keeps_x(self) -> bool:
        # What the others need is a sum of x, as small as M is wide.
        return self.form == ROTATION

    def forward(self, x: Tensor, parameters: tuple[Tensor, ...], options: dict[str, Any]) -> core_op.Kept:
        (m,) = parameters
        return _core.square_forward(
            x,
            m,
            self.form,
            self.scale,
            out=self.out,
            angles=self._angles(m, x.shape[-1]),
            fold=self.fold,
            stream=stream(x.device),
            **options,
        )

    def backward(
        self, gy: Tensor, parameters: tuple[Tensor, ...], given: core_op.Given
    ) -> tuple[Tensor | None, ...]:
        (m,) = parameters
        return _core.square_backward(
            gy,
            given.x,
            given.kept,
            m,
            self.form,
            self.scale,
            features=given.features,
            angles=self._angles(m, given.features),
            fold=self.fold,
            needs=(given.needs_parameters, given.needs_x),
            stream=stream(gy.device),
            **given.options,
        )

    def _angles(self, m: Tensor, features: int) -> tuple[Tensor, Tensor] | None:
        if self.form != ROTATION:
            return None
        side = m.shape[0]
        return _kept_angles(side, -(-features // side), m.dtype, m.device)
