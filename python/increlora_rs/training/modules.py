"""One adapted module as the scheduler sees it: its parameters, and when each of its rows was born."""

from __future__ import annotations

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
        row_births: Step at which each row of A, and column of B, was born; 0: from the start.
        e_births: Step at which each row of E was born, that is, became active.
    """

    name: str
    layer: AdaptedLayer
    adapter: str
    row_births: list[int] = field(default_factory=list)
    e_births: list[int] = field(default_factory=list)
    # What E was multiplied by since the optimizer's state followed.
    _rescaled: float = field(default=1.0, init=False, repr=False)

    @property
    def a(self) -> nn.Parameter:
        """A, (rows, in)."""
        return self.layer.factors(self.adapter)[0]

    @property
    def b(self) -> nn.Parameter:
        """B, (out, rows)."""
        return self.layer.factors(self.adapter)[1]

    @property
    def e(self) -> nn.Parameter:
        """E, (rank, 1)."""
        return self.layer.factors(self.adapter)[2]

    @property
    def rank(self) -> int:
        """Number of active components."""
        return self.layer.rank(self.adapter)

    @property
    def rows(self) -> int:
        """Number of components, those in reserve included."""
        return int(self.a.shape[0])

    @property
    def parameters(self) -> list[tuple[nn.Parameter, int, list[int]]]:
        """Each parameter, the dimension along which it grows, and the births of its rows."""
        return [(self.a, 0, self.row_births), (self.b, 1, self.row_births), (self.e, 0, self.e_births)]

    def first_learners(self) -> list[nn.Parameter]:
        """The factor that starts at 0, and so is the first to get a gradient; none where all are random."""
        layer = self.layer
        tensors: Any = layer.tensors(self.adapter)
        return [
            tensors[name] for name in layer.structure.first_learners(layer.site, layer.configs[self.adapter])
        ]

    @property
    def _structure(self) -> Any:
        return self.layer.structure

    def rescaled_by_growth(self, old_rank: int, rank: int) -> float:
        """What a growth from ``old_rank`` to ``rank`` multiplies the old rows of E by."""
        config, alpha = self.layer.configs[self.adapter], self.layer.lora_alpha[self.adapter]
        return self.layer.structure.rescaled_by_growth(config, alpha, old_rank, rank)

    def start(self) -> None:
        """Marks all rows as there from the start."""
        self.row_births, self.e_births = [0] * self.rows, [0] * self.rank

    def grow(
        self,
        components: int,
        generator: torch.Generator,
        directions: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Makes more components active; :meth:`follow` comes after."""
        before = self.rank
        self._structure.grow(self.layer, self.adapter, components, generator, directions)
        self._rescaled *= self.rescaled_by_growth(before, self.rank)

    def set_reserve(self, components: int, generator: torch.Generator | None = None) -> None:
        """Draws, or drops, components in reserve; :meth:`follow` comes after."""
        self._structure.set_reserve(self.layer, self.adapter, components, generator)

    def add_reserve(self, a: Tensor, b: Tensor) -> None:
        """Puts given components in reserve: A (n, in), B (out, n)."""
        self._structure.add_reserve(self.layer, self.adapter, a, b)

    def reserve_factors(self) -> list[Tensor]:
        """Copies of the components in reserve: A (n, in), B (out, n)."""
        return [self.a.detach()[self.rank :].clone(), self.b.detach()[:, self.rank :].clone()]

    def follow(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Brings births and optimizer state in step with the parameters; new rows are born now."""
        for parameter, dim, births in self.parameters:
            rescaled = self._rescaled if parameter is self.e else 1.0
            # State that did not have to follow stays, whatever it is.
            if len(births) != parameter.shape[dim] or rescaled != 1.0:
                resize_state(optimizer, parameter, dim, rescaled)
        self._rescaled = 1.0
        for births, size in ((self.row_births, self.rows), (self.e_births, self.rank)):
            births[size:] = [step] * (size - len(births))


def adapted_modules(model: nn.Module, adapter: str) -> list[AdaptedModule]:
    """The modules with adapter ``adapter``, in model order."""
    layers = adapted_layers(model, adapter)
    return [AdaptedModule(short(name), layer, adapter) for name, layer in layers.items()]
