"""A linear sketch of a module's gradient: small, and a sum over backward passes as the gradient itself is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _core
from ..support.seeded import generator
from .gauge import Gauge

# What :meth:`Sketches.add` has seen of a slot; 0: nothing was added.
_FINITE, _NOT_FINITE = 1, 2


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

    def add(self, gy: Tensor, x: Tensor, taken: tuple[Tensor, Tensor] | None = None) -> bool:
        """Adds ``gy^T x`` of gy (tokens, out) and x (tokens, in), which is not formed; gives whether left and
        right are finite, on a GPU true.

        Args:
            taken: Sums that left and right are first taken into: the product comes in their place.
        """
        return _core.add_to_sketch_(self.left, self.right, self.omega, self.psi, gy, x, taken)

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

    :meth:`take_` adds those of a step to a sum. All together they are too large for a processor's cache, so
    on the CPU that waits, module by module, for the next backward pass, which has the sketch at hand. Whoever
    asks for :attr:`total` or :attr:`sum` sees nothing of it.

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
        self._sum, self._sums = total.new_zeros(0), list[tuple[Tensor, Tensor]]()
        self._forget()

    def _forget(self) -> None:
        # Of each slot: what :meth:`add` has seen of the step, and does its part belong to a step before?
        self._seen, self._waits = bytearray(len(self._sketches)), bytearray(len(self._sketches))
        # The vector's version, unless graphs write to it, too: then nothing waits any more.
        self._version: int | None = None
        self._alone = self._total.device.type == "cpu"

    def _of(self, given: Sequence[Sequence[Tensor]]) -> list[Sketch]:
        rows = len(given[0][0]), len(given[0][1])
        pairs = pairs_of(self._total, self._sizes, rows)
        return [Sketch(*pair, *own) for pair, own in zip(pairs, given, strict=True)]

    def draw(self, rows: tuple[int, int], seed: int) -> None:
        """Draws Omega and Psi, which modules of one size share, for sketches that are 0, and so is their sum.

        Args:
            rows: k and l.
            seed: Of the random numbers: the same ones for the same seed.
        """
        sizes, like = self._sizes, self._total
        omegas = {n: _normal(like, (rows[0], n), seed, "omega") for n in {features for _, features in sizes}}
        psis = {n: _normal(like, (rows[1], n), seed, "psi") for n in {out for out, _ in sizes}}
        lengths = [length_of([size], rows) for size in sizes]
        self._hold(like.new_zeros(sum(lengths)), lengths)
        self._sketches = self._of([(omegas[features], psis[out]) for out, features in sizes])
        self._sum = torch.zeros_like(self._total)
        self._sums = self.pairs(self._sum)
        self._forget()

    @property
    def total(self) -> Tensor:
        """What the backward passes of the step have added."""
        self._settle()
        # It may be written to.
        self._version = None
        return self._total

    @property
    def sum(self) -> Tensor:
        """What :meth:`take_` has taken, as long as ``total``."""
        self._settle()
        return self._sum

    def take_(self, steps: Tensor, *, scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Takes what the step has added into :attr:`sum`, and makes it 0, as ``_core.take_sketches_``."""
        self._look_for_others()
        may_wait = self._alone and scale is None and found_inf is None and all(self._seen)
        if may_wait and max(self._seen) == _FINITE:
            self._waits = bytearray(b"\1") * len(self._waits)
            steps += 1
        else:
            _core.take_sketches_(self.total, self._sum, steps, scale=scale, found_inf=found_inf)
        self._seen = bytearray(len(self._seen))

    def _look_for_others(self) -> None:
        self._alone &= self._version in (None, self._total._version)

    def _settle(self) -> None:
        self._look_for_others()
        if not any(self._waits):
            return
        if all(self._waits):
            self._sum += self._total
            self._total.zero_()
        else:
            for slot, waits in enumerate(self._waits):
                if waits:
                    self._take_in(slot)
        self._waits = bytearray(len(self._waits))
        self._version = None

    def _take_in(self, slot: int) -> None:
        for sum, part in zip(self._sums[slot], self._parts(slot), strict=True):
            sum += part
            part.zero_()

    def _parts(self, slot: int) -> tuple[Tensor, Tensor]:
        return self._sketches[slot].left, self._sketches[slot].right

    def clear(self) -> None:
        """Gives the memory back."""
        self._hold(self._total.new_zeros(0))
        self._sketches, self._sums = [], []
        self._sum = self._sum.new_zeros(0)
        self._forget()

    def pairs(self, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Left and right of each module in a vector as long as ``total``."""
        omega, psi = self.given(0)
        return pairs_of(vector, self._sizes, (len(omega), len(psi)))

    def add(self, slot: int, gy: Tensor, x: Tensor) -> None:
        """Adds ``gy^T x``, which is not formed."""
        self._look_for_others()
        taken = self._sums[slot] if self._waits[slot] else None
        self._waits[slot] = 0
        finite = self._sketches[slot].add(gy, x, taken)
        self._seen[slot] = _FINITE if finite else _NOT_FINITE
        self._version = self._total._version

    def add_lookup(self, slot: int, gy: Tensor, ids: Tensor) -> None:
        """The same for x whose row t is 1 at ``ids[t]`` and 0 elsewhere."""
        with self._noted(slot) as sketch:
            sketch.add_lookup(gy, ids)

    def add_gradient(self, slot: int, gradient: Tensor) -> None:
        """Adds a gradient (out, in) that exists."""
        with self._noted(slot) as sketch:
            sketch.add_matrix(gradient)

    @contextmanager
    def _noted(self, slot: int) -> Iterator[Sketch]:
        self._look_for_others()
        if self._waits[slot]:
            self._take_in(slot)
            self._waits[slot] = 0
        yield self._sketches[slot]
        finite = not self._alone or all(bool(part.isfinite().all()) for part in self._parts(slot))
        self._seen[slot] = _FINITE if finite else _NOT_FINITE
        self._version = self._total._version

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
