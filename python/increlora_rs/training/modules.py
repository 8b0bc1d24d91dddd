"""One adapted module as the training sees it: its parameters, and when each of their rows was born."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import AdaptedLayer
from ..layers.found import adapted_layers
from ..resizing.optimizer_state import resize_state
from ..support.names import short


@dataclass
class AdaptedModule:
    """A layer with its adapter.

    Args:
        name: Full module name.
        layer: The layer.
        adapter: Name of the adapter.
        births: Step at which each row of each parameter was born, in the order of ``factors``; 0: from the
            start. A row is along the dimension in which the parameter grows.
    """

    name: str
    layer: AdaptedLayer
    adapter: str
    births: list[list[int]] = field(default_factory=list)
    # What the old rows of a rescaled parameter were multiplied by since the optimizer's state followed.
    _rescaled: float = field(default=1.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.births:
            self.births = [[] for _ in self.structure.names]

    @property
    def structure(self) -> Any:
        """What makes the update of the parameters."""
        return self.layer.structure

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        """The parameters, in the order of ``structure.names``."""
        return self.layer.factors(self.adapter)

    @property
    def dims(self) -> list[int]:
        """The dimension of each along which its rows lie."""
        return [self.structure.growing.get(name, 0) for name in self.structure.names]

    @property
    def parameters(self) -> list[tuple[nn.Parameter, int, list[int]]]:
        """Each parameter, the dimension of its rows, and their births."""
        return list(zip(self.factors, self.dims, self.births, strict=True))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each parameter."""
        return tuple(int(p.shape[dim]) for p, dim in zip(self.factors, self.dims, strict=True))

    @property
    def rank(self) -> int:
        """Number of active components."""
        return self.layer.rank(self.adapter)

    @property
    def rows(self) -> int:
        """The most rows that a parameter has that grows: components, those in reserve included."""
        return self.rows_of(self.rank, self.sizes)

    def rows_of(self, rank: int, sizes: Sequence[int]) -> int:
        """:attr:`rows` at rank ``rank`` where the parameters have these ``sizes``."""
        growing = self.structure.growing
        named = zip(self.structure.names, sizes, strict=True)
        return max((size for name, size in named if name in growing), default=rank)

    def first_learners(self) -> list[nn.Parameter]:
        """The parameters that are the first to get a gradient; none where all are."""
        config = self.layer.configs[self.adapter]
        named = dict(zip(self.structure.names, self.factors, strict=True))
        return [named[name] for name in self.structure.first_learners(self.layer.site, config)]

    def start(self) -> None:
        """Marks all rows as there from the start."""
        self.births = [[0] * size for size in self.sizes]

    def rescaled_by_growth(self, old_rank: int, rank: int) -> float:
        """What a growth from ``old_rank`` to ``rank`` multiplies the old rows of rescaled parameters by."""
        config, alpha = self.layer.configs[self.adapter], self.layer.lora_alpha[self.adapter]
        factor: float = self.structure.rescaled_by_growth(config, alpha, old_rank, rank)
        return factor

    def grow(
        self,
        components: int,
        generator: torch.Generator,
        directions: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Makes more components active, where the structure can grow; :meth:`follow` comes after."""
        before = self.rank
        self.structure.grow(self.layer, self.adapter, components, generator, directions)
        self._rescaled *= self.rescaled_by_growth(before, self.rank)

    def set_reserve(self, components: int, generator: torch.Generator | None = None) -> None:
        """Draws, or drops, components in reserve; :meth:`follow` comes after."""
        self.structure.set_reserve(self.layer, self.adapter, components, generator)

    def follow(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Brings births and optimizer state in step with the parameters; new rows are born now."""
        named = zip(self.structure.names, self.parameters, strict=True)
        for name, (parameter, dim, births) in named:
            rescaled = self._rescaled if name in self.structure.rescaled else 1.0
            size = int(parameter.shape[dim])
            # State that did not have to follow stays, whatever it is.
            if len(births) != size or rescaled != 1.0:
                resize_state(optimizer, parameter, dim, rescaled)
            births[size:] = [step] * (size - len(births))
        self._rescaled = 1.0


def adapted_modules(model: nn.Module, adapter: str) -> list[AdaptedModule]:
    """The modules with adapter ``adapter``, in model order."""
    layers = adapted_layers(model, adapter)
    return [AdaptedModule(short(name), layer, adapter) for name, layer in layers.items()]
