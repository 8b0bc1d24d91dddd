"""An adapter that ``fully_shard`` (FSDP2) has cut with the block that it is in: each process has some rows of
every parameter, and FSDP averages the gradients of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..resizing.cut import device_of, here, sharded_modules
from .pieces import Pieces
from .sharding import groups_of, refuse_partly_sharded


class ShardedPieces(Pieces):
    """The rows that this process has of an adapter's parameters, which are DTensors.

    Where several processes have the same rows (HYBRID_SHARD, a mesh of two dimensions), those of the first
    count, and the others take them.

    Args:
        modules: Those on which ``fully_shard`` was called, of which the parameters are.
        parameters: The adapter's.
    """

    def __init__(self, modules: Sequence[Any], parameters: Sequence[nn.Parameter]) -> None:
        self._modules = modules
        places: dict[int, int] = {}
        # Of which parameters this process is the first of those that have its rows.
        self._first: dict[int, bool] = {}
        for parameter in parameters:
            assert isinstance(parameter, DTensor)
            mesh, placements = parameter.device_mesh, parameter.placements
            _, (row, *_) = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
            places[id(parameter)] = row * parameter.shape[1:].numel()
            coordinates = mesh.get_coordinate()
            assert coordinates is not None
            pairs = zip(coordinates, placements, strict=True)
            self._first[id(parameter)] = all(k == 0 or not one.is_replicate() for k, one in pairs)
        self.device = device_of(parameters[0])
        super().__init__(places, self.device)

    def settle(self) -> None:
        """Has the modules hold what is cut, and not what it was gathered to in a forward pass."""
        for module in self._modules:
            module.reshard()

    def value(self, weight: nn.Parameter) -> Tensor:
        """This process's rows."""
        return here(weight.detach())

    def gradient(self, weight: nn.Parameter) -> Tensor | None:
        """Their gradient, averaged and clipped."""
        return here(weight.grad)

    def gathered(
        self, weights: Sequence[Tensor], values: Sequence[Tensor | None], *, wide: bool = False
    ) -> list[Tensor | None]:
        """Of each value the whole, made of all processes' rows, 0 where one has none."""
        pairs = zip(weights, values, strict=True)
        mine = [value if self._first[id(weight)] else None for weight, value in pairs]
        return super().gathered(weights, mine, wide=wide)


def sharded_pieces(model: nn.Module, parameters: Sequence[nn.Parameter]) -> ShardedPieces | None:
    """The pieces of an adapter's ``parameters`` that ``fully_shard`` has cut; None where they are whole.

    Raises:
        ValueError: some are cut and others whole; they are cut otherwise than by rows, by something else than
            ``fully_shard``, or over some of the processes.
    """
    cut = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    if not cut:
        return None
    if len(cut) < len(parameters):
        raise ValueError(
            f"model: fully_shard (FSDP2) shards {len(cut)} parameters of the adapter and leaves "
            f"{len(parameters) - len(cut)} whole; give ignored_params=increlora_rs.adapter_parameters(model) "
            "in each call, or in none."
        )
    wanted, modules = {id(parameter) for parameter in cut}, []
    for module in sharded_modules(model):
        held = {id(one.sharded_param) for group in groups_of(module) for one in group.fsdp_params} & wanted
        wanted -= held
        if held:
            modules.append(module)
    other = next((one for one in cut if id(one) in wanted or not _by_rows(one)), None)
    if other is not None:
        raise ValueError(
            f"model: a parameter of its adapter, of shape {tuple(other.shape)}, is split over a mesh of "
            f"{other.device_mesh.size()} processes as ({', '.join(map(str, other.placements))}), and of "
            "those that are split only what fully_shard (FSDP2) has cut by rows can be trained. Leave out "
            "shard_placement_fn and tensor parallelism, or give "
            "ignored_params=increlora_rs.adapter_parameters(model)."
        )
    # Before anything is gathered over all of them.
    if dist.get_world_size() > 1:
        refuse_partly_sharded(modules)
    return ShardedPieces(modules, parameters)


def _by_rows(parameter: DTensor) -> bool:
    *others, last = parameter.placements
    return last.is_shard(0) and all(one.is_replicate() for one in others)
