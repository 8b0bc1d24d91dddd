"""A linear sketch of a module's gradient: small, and a sum over backward passes as the gradient itself is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..support.seeded import generator


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
        collector: What a compiled graph knows of it: a leaf of which left and right together are the
            gradient.
    """

    left: Tensor
    right: Tensor
    omega: Tensor
    psi: Tensor
    collector: Tensor

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


def sketches_of(
    step: Tensor, sizes: Sequence[tuple[int, int]], rows: tuple[int, int], seed: int
) -> list[Sketch]:
    """The sketches of modules of the given sizes (out, in), in the vector ``step`` one after the other.

    Args:
        rows: k and l.
        seed: Of Omega and Psi, which modules of one size share.
    """
    omegas = {n: _normal(step, (rows[0], n), seed, "omega") for n in {features for _, features in sizes}}
    psis = {n: _normal(step, (rows[1], n), seed, "psi") for n in {out for out, _ in sizes}}
    wholes = step.split([length_of([size], rows) for size in sizes])
    parts = zip(pairs_of(step, sizes, rows), wholes, sizes, strict=True)
    return [
        Sketch(*pair, omegas[features], psis[out], _collector(whole))
        for pair, whole, (out, features) in parts
    ]


def _collector(gradient: Tensor) -> Tensor:
    # Nobody reads its numbers, so one stands for all.
    leaf = gradient.new_zeros(1).expand(gradient.shape).requires_grad_()
    # Autograd adds to the gradient in place.
    leaf.grad = gradient
    return leaf


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


class SketchGauge:
    """The sketches of all modules, in one vector."""

    def __init__(self, modules: int, device: torch.device) -> None:
        # One list for ever: the layers know it.
        self.sketches: list[Sketch] = []
        self.total = torch.zeros(0, device=device)
        self._importance = torch.zeros(modules, dtype=torch.float64, device=device)

    def attach(self, probe: Any, scheduler: Any) -> None:
        """Gives the layers what they add to."""
        probe.attach(scheduler, self._importance)
        probe.sketches = self.sketches

    def arm(self, probe: Any, wanted: bool) -> None:
        """Asks the next backward passes for it, or no longer."""
        probe.arm(None, sketching=wanted)
