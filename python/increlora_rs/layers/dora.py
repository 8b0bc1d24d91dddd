"""DoRA (arXiv 2402.09353): an adapter with a magnitude for each output beside its update, so that the weight
is ``W' = m (W + s B diag(E) A) / ||W + s B diag(E) A||``, the norm that of each row.

Of a growth the magnitude knows nothing: it is as long as the layer is wide, and what grows is the direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.dora import gain_of, magnified, row_norms, row_squares
from ..ops.modes import readable
from .factor import Factor
from .offload import hook_of, onloaded
from .weight import numbers_of

#: What an adapter's magnitudes are called, in a layer and in a file: PEFT's name.
MAGNITUDE = "lora_magnitude_vector"


class Layer(Protocol):
    """What is read of an adapted layer."""

    in_features: int
    out_features: int
    channel: int
    merged_adapters: list[str]
    quantization: Any
    squares: Squares

    def get_base_layer(self) -> Any:
        """The frozen module."""

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Its weight as the matrix (out, in)."""

    def factors(self, adapter_name: str) -> tuple[Any, ...]:
        """The parameters of the update."""

    def rank(self, adapter_name: str) -> int:
        """Its rank."""

    def magnitude(self, adapter_name: str) -> Magnitude | None:
        """The magnitudes, if there are any."""

    def update(self, adapter_name: str) -> Any:
        """The update outside of training."""

    def update_in_use(self, name: str, x: Tensor) -> Any:
        """The update as the forward pass takes it."""


class Magnitude(Factor):
    """m of one adapter of a layer, (out), as ``weight``.

    Args:
        norms: The first values.
        dtype: That of the adapter's factors.
    """

    def __init__(self, norms: Tensor, dtype: torch.dtype) -> None:
        super().__init__(norms.to(dtype))
        # PEFT widens an adapter after it was made, from which rounded norms do not come back.
        self._unrounded = norms if self.weight.dtype != norms.dtype else None
        # Of a merge, to take it back: the gain of each row, and the rows that it took to nothing.
        self.merged: tuple[Tensor, Tensor] | None = None

    def settle(self) -> None:
        """The adapter has its dtype now: where the first values fit into it, they are taken unrounded."""
        norms, self._unrounded = self._unrounded, None
        if norms is not None and self.weight.dtype == norms.dtype:
            self.weight.data.copy_(norms)


class Squares:
    """``||W_o||^2`` of a frozen weight, kept as long as the weight is the same."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._squares: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor | None:
        """Those of W (out, in); None where nothing says whether it is the same."""
        if torch.compiler.is_compiling() or not readable(weight) or weight.is_inference():
            return None
        key = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype, weight.device)
        if self._squares is None or key != self._key:
            self._key, self._squares = key, row_squares(weight.detach())
        return self._squares

    def forget(self) -> None:
        """The weight was changed where nothing tells it."""
        self._squares = None


def new_magnitude(layer: Layer, name: str) -> Magnitude:
    """The norms that the rows have with a fresh update: the layer gives what it gave without a magnitude.

    Raises:
        ValueError: another adapter is merged into the weight, or the weight cannot be read.
    """
    first = layer.factors(name)[0]
    if first.is_meta:
        # It is about to be loaded.
        return Magnitude(torch.empty(layer.out_features, dtype=first.dtype, device="meta"), first.dtype)
    if layer.merged_adapters:
        raise ValueError(
            f"use_dora=True: adapter {name!r} needs the norms of the base weight, into which "
            f"{layer.merged_adapters} are merged; call unmerge_adapter() first."
        )
    try:
        with _matrix(layer) as weight:
            norms = row_norms(weight, layer.update(name), layer.squares.of(weight))
    except ValueError as error:
        if layer.quantization is None:
            raise
        raise ValueError(
            f"use_dora=True needs the numbers of the base weight, which {layer.quantization.backend_name} "
            f"does not give: {error} Or leave use_dora out."
        ) from error
    return Magnitude(norms, first.dtype)


@contextmanager
def _matrix(layer: Layer) -> Iterator[Tensor]:
    """The frozen weight (out, in), dequantised, for as long as the context lasts where it is offloaded.

    Raises:
        ValueError: it is split over processes, or its library cannot give it.
    """
    base = layer.get_base_layer()
    with nullcontext() if hook_of(base) is None else onloaded(base):
        matrix = layer.as_matrix(numbers_of(base, layer.quantization))
        if matrix.shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"use_dora=True needs the whole base weight, of {layer.out_features} rows and "
                f"{layer.in_features} columns, and finds {tuple(matrix.shape)}: it is split over processes; "
                "train without use_dora, or by DDP."
            )
        yield matrix


def in_magnitude(layer: Layer, held: Magnitude, y: Tensor, name: str, *, inplace: bool) -> Tensor:
    """``y``, the layer's output with the update of adapter ``name``, with the magnitudes that it has."""
    with _matrix(layer) as weight:
        norms = row_norms(weight, layer.update_in_use(name, y), layer.squares.of(weight))
    with onloaded(held) if held.weight.is_meta else nullcontext():
        bias = getattr(layer.get_base_layer(), "bias", None)
        return magnified(y, held.weight, norms, bias, channel=layer.channel, inplace=inplace)


def change_of_merge(layer: Layer, held: Magnitude, name: str) -> Tensor:
    """What the merge of an adapter adds to the base weight, (out, in), float32 or wider.

    The norm is that of the weight without any adapter, as in a forward pass.
    """
    update = layer.update(name)
    with torch.no_grad(), _matrix(layer) as weight:
        before = weight.to(torch.promote_types(weight.dtype, torch.float32))
        frozen = before
        for other in reversed(layer.merged_adapters):
            frozen = _taken_out(layer, frozen, other)
        gain = gain_of(held.weight.to(before.device), row_norms(frozen, update)).unsqueeze(1)
        held.merged = gain, before[gain.view(-1) == 0.0].clone()
        return gain * (before + update.dense()) - before


def change_of_unmerge(layer: Layer, held: Magnitude, name: str) -> Tensor:
    """What takes the merge of an adapter back when it is added to the base weight, (out, in)."""
    with torch.no_grad(), _matrix(layer) as weight:
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
        change = _taken_out(layer, merged, name) - merged
    held.merged = None
    return change


def _taken_out(layer: Layer, merged: Tensor, name: str) -> Tensor:
    """The weight before adapter ``name`` was merged, the last one of those that are."""
    update = layer.update(name).dense() if layer.rank(name) else 0.0
    held = layer.magnitude(name)
    if held is None or held.merged is None:
        return merged - update
    gain, lost = held.merged
    gain = gain.to(merged.device)
    before = merged / gain - update
    before[gain.view(-1) == 0.0] = lost.to(merged)
    return before
