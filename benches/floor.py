"""The least that an adapter must cost beside its frozen layer: FLOPs and bytes, and the rates of this
machine at which they are turned into time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .sizes import Size
from .timing import interleave, median

ELEMENT = {"float32": 4, "bfloat16": 2, "bfloat16 throughout": 2}


@dataclass(frozen=True)
class Work:
    """Arithmetic and memory traffic."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Rates:
    """What the machine does a second: FLOPs of a matrix product by element size, bytes of a copy."""

    gemm: dict[int, float]
    copy: float

    def milliseconds(self, work: Work, element: int) -> float:
        """Time of ``work`` if arithmetic and traffic overlapped perfectly."""
        return 1e3 * max(work.flops / self.gemm[element], work.bytes / self.copy)

    def to_json(self) -> dict[str, object]:
        """As :meth:`from_json` takes it."""
        return {"gemm": {str(size): rate for size, rate in self.gemm.items()}, "copy": self.copy}

    @classmethod
    def from_json(cls, saved: dict[str, object]) -> Rates:
        """What :meth:`to_json` gave."""
        gemm, copy = saved["gemm"], saved["copy"]
        assert isinstance(gemm, dict) and isinstance(copy, float)
        return cls({int(size): float(rate) for size, rate in gemm.items()}, copy)


def frozen(shape: tuple[int, int], tokens: int) -> Work:
    """The frozen layer's forward pass and the gradient for its input, arithmetic only."""
    return Work(4.0 * tokens * shape[0] * shape[1], 0.0)


def adapter(shape: tuple[int, int], tokens: int, rank: int, dropout: float, element: int) -> Work:
    """What any low-rank update that runs beside the base layer's own products adds to it.

    Six products of r rows: t = A x, y += P t, u = P^T gy, dx += A^T u, dA, dB. With n = tokens:
    forward x is read and y read and written; backward gy is read once for u and dB, x once for dA, dx
    read and written. Dropout adds a mask of a bit an element, written once and read twice.
    """
    features, out = shape
    flops = 6.0 * tokens * rank * (features + out)
    traffic = float(element * tokens * (4 * features + 3 * out))
    if dropout > 0.0:
        traffic += 3 * tokens * features / 8
    return Work(flops, traffic)


def importance(shape: tuple[int, int], tokens: int, element: int) -> Work:
    """The gradient of the dense update, a block at a time: gy and x are read once."""
    features, out = shape
    return Work(2.0 * tokens * features * out, float(element * tokens * (features + out)))


def saved_bytes(
    shape: tuple[int, int], tokens: int, rank: int, dropout: float, element: int, *, layers: int = 1
) -> float:
    """What the backward pass cannot do without: x once, each layer's t, and its bit of mask an element."""
    features, _ = shape
    mask = tokens * features / 8 if dropout > 0.0 else 0.0
    return element * tokens * features + layers * (element * tokens * rank + mask)


def measure(size: Size, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """This machine's rates by ``clock``, as far as torch reaches them."""
    n, features, out = size.batch * size.tokens, size.width, 4 * size.width
    gemm = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = (torch.randn(rows, features).to(size.device, dtype) for rows in (n, out))
        seconds = _seconds(lambda x=x, weight=weight: x @ weight.T, size, clock)  # type: ignore[misc]
        gemm[dtype.itemsize] = 2.0 * n * features * out / seconds
    source = torch.zeros(size.large_bytes // 4, device=size.device)
    target = torch.empty_like(source)
    copied = 2.0 * source.nbytes
    return Rates(gemm, copied / _seconds(lambda: target.copy_(source), size, clock))


def _seconds(call: Callable[[], object], size: Size, clock: Callable[[], float]) -> float:
    return median(interleave({"": call}, seconds=1.0, rounds=size.rounds, clock=clock)[""]) / 1e3


def layers_of_step(size: Size) -> list[tuple[int, int]]:
    """Shapes (in, out) of all adapted layers of the training step's model."""
    wide = (size.width, 4 * size.width)
    return ([(size.width, size.width)] * 4 + [wide, wide[::-1]]) * size.layers
