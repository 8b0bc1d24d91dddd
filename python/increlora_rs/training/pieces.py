"""Where the numbers of an adapter are that does not change its size: whole in each process, or in pieces, as
FSDP1 lays parameters into flat ones and gives every process a part of these."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layers.factor import Factor
from ..resizing.optimizer_state import start_anew
from ..resizing.room import padded


class Whole:
    """All numbers are in this process."""

    is_sharded = False
    # Does a checkpoint of the optimizer hold the parameters' values, too?
    values_in_state = False
    # Those of what is trained; None: the parameters'.
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def settle(self) -> None:
        """Before anything is at work: has the model hold the parameters that the optimizer trains."""

    def value(self, weight: nn.Parameter) -> Tensor:
        """What this process has of a parameter, as it is trained."""
        return weight.detach()

    def gradient(self, weight: nn.Parameter) -> Tensor | None:
        """Of the same numbers the gradient, if there is one."""
        return weight.grad

    def seen(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """``optimizer`` as one that holds the parameters."""
        return optimizer

    def trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Is a step of ``optimizer`` that begins or ends one of the parameters?"""
        return True

    def start_anew(self, optimizer: torch.optim.Optimizer, weight: nn.Parameter, counted: int | None) -> None:
        """As :func:`increlora_rs.resizing.optimizer_state.start_anew`."""
        # Where this process has no piece of it, there is no state.
        if weight.numel():
            start_anew(optimizer, weight, counted)

    def share(self) -> None:
        """Values were written outside of a step: has the model compute with them."""

    def gathered(
        self, weights: Sequence[Tensor], values: Sequence[Tensor | None], *, wide: bool = False
    ) -> list[Tensor | None]:
        """Of each of ``values``, which belong to ``weights``, the whole; None where there is none.

        ``wide``: are there values in float64 that belong to parameters in less?"""
        return list(values)

    def put(self, factor: Factor, value: Tensor, rows: Tensor, most: int) -> None:
        """Writes ``rows`` to the front of ``value``, in the shape of the factor's weight, and zeros behind
        them until row ``most``."""
        count = rows.shape[factor.dim]
        value.narrow(factor.dim, 0, count).copy_(rows)
        if most > count:
            value.narrow(factor.dim, count, most - count).zero_()

    def in_any(self, fact: bool) -> bool:
        """``fact``."""
        return fact

    def all_of(self, names: set[str]) -> list[str]:
        """``names``, in order."""
        return sorted(names)


class Pieces(Whole):
    """Each process has a piece of every parameter, maybe an empty one: numbers that follow each other when
    the parameter is laid out by rows.

    All methods have to be called by all processes alike.

    Args:
        places: By the id of each parameter the place of its piece's first number.
    """

    is_sharded = True

    def __init__(self, places: dict[int, int], device: torch.device) -> None:
        self._places, self._device = places, device
        self._shapes: dict[int, torch.Size] = {}

    def know(self, factors: Sequence[Factor]) -> None:
        """Takes the shapes that the weights have when they are whole."""
        for factor in factors:
            assert factor.room is not None
            self._shapes[id(factor.weight)] = torch.Size(factor.room)

    def gathered(
        self, weights: Sequence[Tensor], values: Sequence[Tensor | None], *, wide: bool = False
    ) -> list[Tensor | None]:
        """Of each value the whole, made of all processes' pieces, 0 where one has none."""
        shapes = [self._shapes[id(weight)] for weight in weights]
        ends = list(itertools.accumulate((shape.numel() for shape in shapes), initial=0))
        wide = wide or any(weight.dtype is torch.float64 for weight in weights)
        dtype = torch.float64 if wide else torch.float32
        flat = torch.zeros(ends[-1] + len(shapes), dtype=dtype, device=self._device)
        for k, (weight, value) in enumerate(zip(weights, values, strict=True)):
            if value is not None and value.numel():
                start = ends[k] + self._places[id(weight)]
                flat[start : start + value.numel()].copy_(value.reshape(-1))
                flat[ends[-1] + k] = 1.0
        dist.all_reduce(flat)
        there = (flat[ends[-1] :] > 0).tolist()
        pairs = zip(itertools.pairwise(ends), shapes, there, strict=True)
        return [flat[start:end].view(shape) if some else None for (start, end), shape, some in pairs]

    def put(self, factor: Factor, value: Tensor, rows: Tensor, most: int) -> None:
        """Writes this process's piece of ``rows``, with zeros behind them."""
        weight = factor.weight
        if value.numel():
            size = self._shapes[id(weight)][factor.dim]
            start = self._places[id(weight)]
            whole = padded(rows, factor.dim, size).view(-1)
            value.copy_(whole[start : start + value.numel()].view_as(value))

    def in_any(self, fact: bool) -> bool:
        """Is it in any process?"""
        shared = torch.tensor(int(fact), device=self._device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return bool(shared)

    def all_of(self, names: set[str]) -> list[str]:
        """The names that any process has, in order."""
        held: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(held, names)
        return sorted(set().union(*held))


def pieces_of(flats: Sequence[Any], parameters: Sequence[nn.Parameter]) -> Pieces:
    """Where the pieces of ``parameters`` are that FSDP1 has laid into the flat parameters ``flats``."""
    places: dict[int, int] = {}
    for flat in flats:
        for parameter, info in zip(flat._params, flat._shard_param_infos, strict=True):
            places[id(parameter)] = info.intra_param_start_idx or 0
    return Pieces(places, parameters[0].device)
