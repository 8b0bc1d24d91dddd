"""Adapted ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from ..ops.convolution import convolution, show_gradient_of
from ..support.sites import Site
from .base import AdaptedLayer
from .shown import of_base


class Convolution(AdaptedLayer):
    """A frozen convolution of 1 to 3 dimensions; in is input channels times the size of the kernel.

    A is a convolution with the base layer's kernel, stride, padding and dilation, and B one of kernel
    size 1 after it.
    """

    kind: ClassVar[str] = "convolution"

    stride = of_base("stride")
    padding = of_base("padding")
    dilation = of_base("dilation")
    groups = of_base("groups")
    padding_mode = of_base("padding_mode")
    kernel_size = of_base("kernel_size")
    in_channels = of_base("in_channels")
    out_channels = of_base("out_channels")

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_channels * math.prod(module.kernel_size), module.out_channels

    def _site(self, name: str) -> Site:
        base = self.get_base_layer()
        if base.groups != 1:
            raise ValueError(
                f"the convolution has groups={base.groups}, and its update would mix them; only groups=1 is "
                "supported: leave it out of target_modules."
            )
        kernel = tuple(base.kernel_size)
        self.channel = -1 - len(kernel)
        return Site(name, kernel, self.out_features, self.in_features)

    @property
    def is_lora(self) -> bool:
        """Not with a dilation or a padding mode, which PEFT's layer leaves out."""
        base = self.get_base_layer()
        return base.padding_mode == "zeros" and set(base.dilation) == {1}

    def _as_weight(self, delta: Tensor) -> Tensor:
        return delta.view(self.get_base_layer().weight.shape)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The base weight as the matrix (out, in)."""
        return weight.flatten(1)

    def _added(self, y: Tensor, x: Tensor, name: str, *, inplace: bool) -> Tensor:
        low_rank: Any = self.update_in_use(name, x)
        base, call = self.get_base_layer(), self._call(name, inplace)
        if low_rank.is_empty:
            left: Tensor = low_rank.leave(y, x, call, show_gradient_of(base))
            return left
        update = convolution(self._dropped(x, name), low_rank, call, base=base)
        return y.add_(update) if inplace else (y + update).to(y.dtype)
