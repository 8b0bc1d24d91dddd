"""A linear sketch of a module's gradient: small, and a sum over backward passes as the gradient itself is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _core
from ..support.seeded import generator
from .gauge import Gauge


@dataclass
class Sketch:
    """The sketch of the gradient G (out, in) of one module's weight.

    What it holds has no part in the products of what is added: in eager mode it holds the sum of the passes
    before, in a compiled graph zeros, and a BLAS rounds otherwise where it adds to a full matrix.

    Args:
        left: ``(G Omega)^T``, (k, out); with ``right`` a view of one vector of all modules.
        right: ``Psi G``, (l, in).
        omega: Omega^T, (k, in), normally distributed and fixed, in the dtype of the sketch as all are.
        psi: Psi, (l, out), the same.
    """

    left: Tensor
    right: Tensor
    omega: Tensor
    psi: Tensor

    def add(self, gy: Tensor, x: Tensor) -> None:
        """Adds ``gy^T x`` of gy (tokens, out) and x (tokens, in), which is not formed."""
        _core.add_to_sketch_(self.left, self.right, self.omega, self.psi, gy, x)

    def add_lookup(self, gy: Tensor, ids: Tensor) -> None:
        """The same for x whose row t is 1 at ``ids[t]`` and 0 elsewhere."""
        gy = gy.to(self.left.dtype).contiguous()
        self.left += self.omega[:, ids] @ gy
        self.right += torch.zeros_like(self.right).index_add_(1, ids, self.psi @ gy.t())

    def add_matrix(self, gradient: Tensor) -> None:
        """Adds a gradient (out, in) that exists."""
        gradient = gradient.to(self.left.dtype).contiguous()
        self.left += self.omega @ gradient.t()
        self.right += self.psi @ gradient


class Sketches(Gauge):
    """A sketch a module, of the gradient of its weight.

    Args:
        total: The vector that the sketches lie in, one after the other.
        sizes: (out, in) of each module.
        given: Omega and Psi of each module; without them there is no sketch before :meth:`draw`.
    """

    name: ClassVar[str] = "sketch"

    def __init__(
        self,
        total: Tensor,
        sizes: Sequence[tuple[int, int]],
        given: Sequence[Sequence[Tensor]] = (),
    ) -> None:
        super().__init__(total)
        self._sizes = sizes
        self._sketches = self._of(given) if given else []

    def _of(self, given: Sequence[Sequence[Tensor]]) -> list[Sketch]:
        rows = len(given[0][0]), len(given[0][1])
        pairs = pairs_of(self.total, self._sizes, rows)
        return [Sketch(*pair, *own) for pair, own in zip(pairs, given, strict=True)]

    def draw(self, rows: tuple[int, int], seed: int) -> None:
        """Draws Omega and Psi, which modules of one size share, for sketches that are 0.

        Args:
            rows: k and l.
            seed: Of the random numbers: the same ones for the same seed.
        """
        sizes, like = self._sizes, self.total
        omegas = {n: _normal(like, (rows[0], n), seed, "omega") for n in {features for _, features in sizes}}
        psis = {n: _normal(like, (rows[1], n), seed, "psi") for n in {out for out, _ in sizes}}
        lengths = [length_of([size], rows) for size in sizes]
        self._hold(like.new_zeros(sum(lengths)), lengths)
        self._sketches = self._of([(omegas[features], psis[out]) for out, features in sizes])

    def clear(self) -> None:
        """Gives the memory back."""
        self._hold(self.total.new_zeros(0))
        self._sketches = []

    def pairs(self, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Left and right of each module in a vector as long as ``total``."""
        omega, psi = self.given(0)
        return pairs_of(vector, self._sizes, (len(omega), len(psi)))

    def add(self, slot: int, gy: Tensor, x: Tensor) -> None:
        """Adds ``gy^T x``, which is not formed."""
        self._sketches[slot].add(gy, x)

    def add_lookup(self, slot: int, gy: Tensor, ids: Tensor) -> None:
        """The same for x whose row t is 1 at ``ids[t]`` and 0 elsewhere."""
        self._sketches[slot].add_lookup(gy, ids)

    def add_gradient(self, slot: int, gradient: Tensor) -> None:
        """Adds a gradient (out, in) that exists."""
        self._sketches[slot].add_matrix(gradient)

    def given(self, slot: int) -> list[Tensor]:
        """Omega and Psi of the module."""
        return [self._sketches[slot].omega, self._sketches[slot].psi]

    @classmethod
    def empty(cls, like: Tensor, size: tuple[int, int], given: Sequence[Tensor]) -> Tensor:
        """A vector for one sketch."""
        omega, psi = given
        return omega.new_empty(length_of([size], (omega.shape[0], psi.shape[0])))

    @classmethod
    def of_one(cls, total: Tensor, size: tuple[int, int], given: Sequence[Tensor]) -> Sketches:
        """The sketch of one module."""
        return cls(total, [size], [given])


def pairs_of(
    vector: Tensor, sizes: Sequence[tuple[int, int]], rows: tuple[int, int]
) -> list[tuple[Tensor, Tensor]]:
    """The parts (k, out) and (l, in) of a vector of :func:`length_of` for each module, as views."""
    ends = [n for out, features in sizes for n in (rows[0] * out, rows[1] * features)]
    parts = vector.split(ends)
    return [
        (left.view(rows[0], out), right.view(rows[1], features))
        for left, right, (out, features) in zip(parts[::2], parts[1::2], sizes, strict=True)
    ]


def length_of(sizes: Sequence[tuple[int, int]], rows: tuple[int, int]) -> int:
    """Length of the vector that holds the sketches of modules of the given sizes."""
    return sum(rows[0] * out + rows[1] * features for out, features in sizes)


def _normal(like: Tensor, shape: tuple[int, int], seed: int, side: str) -> Tensor:
    drawn = torch.randn(shape, generator=generator(seed, "sketch", side, *shape), dtype=torch.float64)
    return drawn.to(device=like.device, dtype=like.dtype)
