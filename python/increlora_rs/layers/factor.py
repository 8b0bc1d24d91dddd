"""One factor of one adapter, under the name that LoRA gives it: ``lora_A.default.weight``."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

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
        _warn_of_hook()
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As ``nn.Module``'s, with a warning: nothing calls the hook."""
        _warn_of_hook()
        return super().register_forward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As ``nn.Module``'s, with a warning: nothing calls the hook."""
        _warn_of_hook()
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As ``nn.Module``'s, with a warning: nothing calls the hook."""
        _warn_of_hook()
        return super().register_full_backward_hook(*args, **kwargs)

    def extra_repr(self) -> str:
        """The shape."""
        return f"{tuple(self.weight.shape)}"


def _warn_of_hook() -> None:
    # Not an error: what logs or counts hooks every module of a model.
    warn(
        "a hook on lora_A, lora_B or lora_E is not called, for the update is computed at once; put it on the "
        "adapted layer, its base_layer or its lora_dropout, or on the weight by register_hook"
    )
