"""DeepSpeed's ZeRO: its optimizer has torch's train flat parameters, of which each process has a piece, and
copies what came out into the model's.

So an adapter of the capacity form is read and written in the flat parameter while torch's optimizer is at its
step: there gradients are averaged and clipped, and what is written is copied and sent around with the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .pieces import Pieces

# Those of ZeRO's optimizers whose flat parameters are known here, by module and class (DeepSpeed 0.19).
_PARTITIONS = ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer")
_WEIGHTS = ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3")
_ENGINE = "deepspeed.runtime.engine"
_DDP = "Or use DDP: leave out `deepspeed` in TrainingArguments."


def is_engine(model: Any) -> bool:
    """Is it what ``deepspeed.initialize`` returned, the model in ``module``?"""
    return any(cls.__module__ == _ENGINE for cls in type(model).__mro__)


def zero_of(model: Any, optimizer: Any) -> Any | None:
    """The optimizer of ZeRO that trains ``model``: ``optimizer``, the one in it (accelerate's wrapper), or
    the engine's; None where torch's optimizer holds the model's own parameters, as without ZeRO.

    Raises:
        ValueError: it is one that cannot train what is allocated during training.
    """
    found = [optimizer, getattr(optimizer, "optimizer", None)]
    if is_engine(model):
        found.append(model.optimizer)
    zero = next((one for one in found if type(one).__module__.startswith("deepspeed.runtime.")), None)
    if zero is None:
        return None
    why = _cannot(zero)
    if why is not None:
        raise ValueError(f"optimizer: a {type(zero).__name__} of DeepSpeed {why} {_DDP}")
    return zero


def _cannot(zero: Any) -> str | None:
    if _kind(zero) not in (_PARTITIONS, _WEIGHTS):
        return (
            "keeps parameters in a form that is not known here; use ZeRO 1, 2 or 3 in float32 or bfloat16, "
            "ZeRO 1 with communication and accumulation of gradients in the parameters' dtype, or stage 0 in "
            "float32."
        )
    if zero.dtype is torch.float16 or zero.torch_autocast_gradscaler is not None:
        return 'scales the loss of a float16 training, which is not supported; set "bf16" in its place.'
    if zero.elastic_checkpoint:
        return "leaves the scheduler's state out of elastic checkpoints; leave elastic_checkpoint out."
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        return (
            "offloads its state, which ranks move; that of an adapter is small: leave offload_optimizer out."
        )
    if dist.get_world_size(zero.dp_process_group) != dist.get_world_size():
        return (
            "partitions over some of the processes, and ranks are chosen by all of them: leave tensor, "
            "pipeline and sequence parallelism out."
        )
    return None


def _kind(zero: Any) -> tuple[str, str]:
    return type(zero).__module__, type(zero).__name__


def _groups(zero: Any) -> list[list[nn.Parameter]]:
    """The model's parameters by the flat one that each lies in."""
    groups: list[list[nn.Parameter]] = zero.fp16_groups if _kind(zero) == _WEIGHTS else zero.bit16_groups
    return groups


def held(zero: Any) -> set[int]:
    """The ids of the model's parameters that it trains."""
    return {id(parameter) for group in _groups(zero) for parameter in group}


def is_trained_by_zero(parameter: nn.Parameter) -> bool:
    """Has an optimizer of ZeRO laid it out?"""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


class ZeroPieces(Pieces):
    """The pieces of an adapter's parameters in one of ZeRO's flat parameters.

    Args:
        zero: ZeRO's optimizer.
        parameters: The adapter's.

    Raises:
        ValueError: they lie in several flat parameters, which are not trained at once.
    """

    values_in_state = True

    def __init__(self, zero: Any, parameters: Sequence[nn.Parameter]) -> None:
        wanted = {id(parameter) for parameter in parameters}
        numbers = [n for n, group in enumerate(_groups(zero)) if wanted & set(map(id, group))]
        if len(numbers) > 1:
            raise ValueError(
                f"optimizer: the adapter's parameters lie in {len(numbers)} of ZeRO's flat parameters, which "
                "are trained one after the other. Give them one group of the optimizer (without LoRA+), and "
                "leave sub_group_size out."
            )
        (number,) = numbers
        find = _in_weights if _kind(zero) == _WEIGHTS else _in_partition
        self._zero, self._weights = zero, [one for one in _groups(zero)[number] if id(one) in wanted]
        self._flat, places = find(zero, number)
        self._in_flat = {one: (start, count) for one, (start, _, count) in places.items()}
        self.dtype = self._flat.dtype
        super().__init__({one: start for one, (_, start, _) in places.items()}, parameters[0].device)

    def value(self, weight: nn.Parameter) -> Tensor:
        """This process's piece, as it is trained."""
        return self._piece(self._flat.detach(), weight)

    def gradient(self, weight: nn.Parameter) -> Tensor | None:
        """Its gradient, averaged and clipped; None outside of a step."""
        return None if self._flat.grad is None else self._piece(self._flat.grad, weight)

    def _piece(self, flat: Tensor, weight: nn.Parameter) -> Tensor:
        return flat.narrow(0, *self._in_flat[id(weight)])

    def start_anew(self, optimizer: torch.optim.Optimizer, weight: nn.Parameter, counted: int | None) -> None:
        """Its numbers in the state become 0; steps are counted for the flat parameter as a whole."""
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.dim():
                value.zero_()

    def trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Is the step at hand one of the adapter's flat parameter?"""
        return self._is_of(optimizer.param_groups)

    def _is_of(self, groups: Sequence[dict[str, Any]]) -> bool:
        return any(one is self._flat for group in groups for one in group["params"])

    def seen(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """``optimizer`` as if it held the adapter's parameters, for what reads its groups and its state: a
        group that trains the flat parameter has them, and their states are pieces of its state."""
        pieces, kind = self, type(optimizer)

        class State:
            def get(self, weight: Any, default: Any = None) -> Any:
                state = optimizer.state.get(pieces._flat, default)
                return state and {key: pieces._of_state(value, weight) for key, value in state.items()}

        def groups(_: Any) -> list[dict[str, Any]]:
            return [
                {**group, "params": pieces._weights} if pieces._is_of([group]) else group
                for group in optimizer.param_groups
            ]

        members = {"param_groups": property(groups), "state": State(), "piece_of": staticmethod(self.value)}
        made: Any = type(kind.__name__, (kind,), members | {"__module__": kind.__module__})
        view: torch.optim.Optimizer = made.__new__(made)
        return view

    def _of_state(self, value: Any, weight: nn.Parameter) -> Any:
        is_of_rows = isinstance(value, Tensor) and value.shape == self._flat.shape
        return self._piece(value, weight) if is_of_rows else value

    @torch.no_grad()
    def share(self) -> None:
        """Has ZeRO copy the flat parameters into the model's, as it does at the end of a step."""
        if _kind(self._zero) == _PARTITIONS:
            self._zero.update_lp_params()
            return
        gathered = [one for one in self._zero.persistent_parameters if one.ds_status.name == "AVAILABLE"]
        if gathered:
            gathered[0].partition(gathered)
        for number in range(len(_groups(self._zero))):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        if gathered:
            gathered[0].all_gather(gathered)


# By the parameter's id: where its piece begins in the flat parameter, where in itself, and its numbers.
_Places = dict[int, tuple[int, int, int]]


def _in_partition(zero: Any, number: int) -> tuple[Any, _Places]:
    """ZeRO 1 and 2: parameters follow each other, and a process has a part of the whole."""
    places: _Places = {}
    for parameter in _groups(zero)[number]:
        piece = parameter._hp_mapping  # type: ignore[attr-defined]
        places[id(parameter)] = (
            (0, 0, 0)
            if piece is None
            else (
                piece.hp_fragment_address.start,
                piece.lp_fragment_address.start,
                piece.hp_fragment_address.numel,
            )
        )
    return zero.single_partition_of_fp32_groups[number], places


def _in_weights(zero: Any, number: int) -> tuple[Any, _Places]:
    """ZeRO 3: a process has a part of each parameter, all of one size, the last ones filled up."""
    places: _Places = {}
    rank, start = dist.get_rank(zero.dp_process_group), 0
    for parameter in _groups(zero)[number]:
        each: int = parameter.partition_numel()  # type: ignore[attr-defined]
        left: int = parameter.ds_numel - rank * each  # type: ignore[attr-defined]
        places[id(parameter)] = (start, rank * each, min(max(left, 0), each))
        start += each
    return zero.fp32_partitioned_groups_flat[number], places
