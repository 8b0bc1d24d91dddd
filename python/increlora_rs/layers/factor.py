"""One factor of one adapter, under the name that LoRA gives it: ``lora_A.default.weight``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..resizing.cut import cut_as, is_cut, whole
from ..resizing.parameter import resize
from ..resizing.room import padded
from ..support.warning import warn


class Constant(nn.Module):
    """What belongs to an update and is not trained, as ``weight``: made anew from a seed, and never saved.

    It keeps the dtype that it was made in, whatever the model is cast to: rounded, it would not be that of
    the seed, from which a saved adapter makes it.

    Args:
        weight: The values.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # No buffer: DistributedDataParallel would send it around in every forward pass.
        self.weight = weight

    def counted(self) -> Tensor:
        """The values."""
        return self.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Constant:
        super()._apply(fn, recurse)
        self.weight = self.weight.to(fn(self.weight).device)
        return self


class Kept(nn.Module):
    """What belongs to an update, is saved with it and not trained, as ``weight``: the policy changes it.

    Args:
        weight: The first values.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # A parameter, for what loads adapters knows those best; no buffer, as above.
        self.weight = nn.Parameter(weight, requires_grad=False)

    def counted(self) -> Tensor:
        """The values."""
        return self.weight


class Factor(nn.Module):
    """A matrix that is trained, as ``weight``; it has no forward pass of its own.

    It reads as its parameter, too: attributes that a module has not are the parameter's (``shape``, ``grad``,
    ``detach()``), and it is the same key, so ``optimizer.state[layer.lora_A["default"]]`` is the parameter's.
    Scripts written for LoRA take ``lora_A["default"].weight``, and those written when the entries were
    parameters themselves go on.

    Args:
        weight: The first values, (rows, columns).
    """

    weight: nn.Parameter
    # Of a shared one, see layers/reentrant.py: what stands for it in the backward pass at hand, and whether
    # its gradient may come in parts.
    stand_in: Tensor | None = None
    in_parts: bool = False
    # In the capacity form: the weight's shape, of which so many rows along ``dim`` count. None: all of them.
    room: tuple[int, ...] | None = None
    dim: int = 0
    rows: int = 0
    # And are graphs made of all rows, those that are 0 too?
    whole_in_graphs: bool = True

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    @property
    def work(self) -> nn.Parameter | None:
        """In the capacity form, while it is trained: the rows that count as a parameter of that size, for
        what decides. It is none of the model's, and the training keeps it in step."""
        kept: nn.Parameter | None = self.__dict__.get("_work")
        return kept

    def make_room(self, dim: int, size: int, *, whole_in_graphs: bool) -> None:
        """Gives the weight ``size`` rows along ``dim``, the new ones 0: the capacity form.

        Raises:
            ValueError: it has more.
        """
        rows = int(self.counted().shape[dim])
        if rows > size:
            raise ValueError(f"it has {rows} rows, and room for {size} was asked for")
        resize(self.weight, padded(self.counted().detach(), dim, size))
        self.room, self.dim, self.rows = tuple(self.weight.shape), dim, rows
        self.whole_in_graphs = whole_in_graphs

    def begin_work(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        """Makes :attr:`work`, values undefined; of the weight's dtype and on its device, or of another that
        it is trained in."""
        weight = self.weight
        rows = torch.zeros(self.outline().shape, dtype=dtype or weight.dtype, device=device or weight.device)
        self.__dict__["_work"] = nn.Parameter(rows)

    def end_work(self) -> None:
        """Lets it go."""
        self.__dict__.pop("_work", None)

    def counted(self) -> Tensor:
        """The rows that count: the weight, or a view of it; where this process has but a part of it, its
        shape alone, on meta."""
        if self.room is None or (self.whole_in_graphs and torch.compiler.is_compiling()):
            return self.weight
        if self.is_part():
            return self.outline()
        return self.weight.narrow(self.dim, 0, self.rows)

    def is_part(self) -> bool:
        """Has this process but a part of the numbers, in the capacity form?"""
        return self.room is not None and (self.weight.shape != self.room or is_cut(self.weight))

    def outline(self) -> Tensor:
        """The shape of the rows that count, without numbers: also in a graph, and of a part."""
        shape = self.weight.shape if self.room is None else self._shape(self.rows)
        return torch.empty(shape, device="meta")

    def take_rows(self, dim: int, rows: int) -> None:
        """Has so many rows along ``dim``, values undefined: for loading.

        Raises:
            ValueError: in the capacity form there is no room for them.
        """
        if self.room is None:
            shape = list(self.weight.shape)
            shape[dim] = rows
            resize(self.weight, self.weight.new_zeros(shape))
            return
        if rows > self.room[self.dim]:
            raise ValueError(
                f"an adapter of rank {rows} does not fit into one in the capacity form that has room for "
                f"{self.room[self.dim]}; raise max_r, or r, to what it was trained with."
            )
        self.rows = rows

    def _shape(self, rows: int) -> Sequence[int]:
        assert self.room is not None
        return [*self.room[: self.dim], rows, *self.room[self.dim + 1 :]]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if f"{prefix}weight" in destination:
            destination[f"{prefix}weight"] = self.to_save(destination[f"{prefix}weight"])

    def to_save(self, weight: Tensor) -> Tensor:
        """What is saved of the weight: the same in both forms. Of one that is cut (FSDP2) all processes have
        to ask, and it is cut anew."""
        if weight.shape != self.room:
            return weight
        if is_cut(weight):
            return cut_as(whole(weight).narrow(self.dim, 0, self.rows).contiguous(), weight)
        return weight.narrow(self.dim, 0, self.rows)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if self.room is not None and weight is not None and list(weight.shape) == self._shape(self.rows):
            weight = padded(whole(weight), self.dim, self.room[self.dim])
            state_dict[f"{prefix}weight"] = cut_as(weight, self.weight) if is_cut(self.weight) else weight
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has no training.
        return {name: value for name, value in self.__dict__.items() if name != "_work"}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # "weight" is missing while a copy is being made.
            if name == "weight" or name.startswith("__"):
                raise
            return getattr(self.weight, name)

    def __eq__(self, other: object) -> bool:
        return self is other or self._parameters.get("weight") is other

    def __hash__(self) -> int:
        # A tensor's hash; without a parameter, as while a copy is being made, the module's own.
        return id(self.__dict__.get("_parameters", {}).get("weight", self))

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """A factor is not called.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a factor of s B diag(E) A has no forward pass of its own; take its weight, or the update as a "
            "whole from the layer's get_delta_weight(adapter_name)."
        )

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As ``nn.Module``'s, with a warning: nothing calls the hook."""
        _warn_of_hook(self)
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As ``nn.Module``'s, with a warning: nothing calls the hook."""
        _warn_of_hook(self)
        return super().register_forward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As ``nn.Module``'s, with a warning: nothing calls the hook."""
        _warn_of_hook(self)
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As ``nn.Module``'s, with a warning: nothing calls the hook."""
        _warn_of_hook(self)
        return super().register_full_backward_hook(*args, **kwargs)

    def extra_repr(self) -> str:
        """The shape."""
        return f"{tuple(self.weight.shape)}"


def _warn_of_hook(factor: Factor) -> None:
    if hasattr(factor._parameters.get("weight"), "ds_id"):
        # DeepSpeed's ZeRO 3, which hooks every module, and brings the numbers without it.
        return
    # Not an error: what logs or counts hooks every module of a model.
    warn(
        "a hook on lora_A, lora_B or lora_E is not called, for the update is computed at once; put it on the "
        "adapted layer, its base_layer or its lora_dropout, or on the weight by register_hook"
    )
