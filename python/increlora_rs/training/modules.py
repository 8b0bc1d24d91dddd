"""One adapted module as the training sees it: its parameters, when each of their rows was born, and which of
them went."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import AdaptedLayer
from ..layers.found import adapted_layers
from ..support.names import short


@dataclass
class Rows:
    """What became of the rows of a module's parameters since somebody followed them.

    Args:
        kept: Of each parameter the old positions, ascending, of the rows that are still there. They stand at
            its beginning, and new ones behind them.
        factor: What the old rows of a rescaled parameter were multiplied by.
    """

    kept: list[list[int]]
    factor: float = 1.0

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Rows:
        """All of parameters of ``sizes`` rows, as they were."""
        return cls([list(range(size)) for size in sizes])

    def then(self, positions: Sequence[Iterable[int]], factor: float = 1.0) -> None:
        """Of each parameter's present rows those at ``positions`` stay, ascending; some may be new ones."""
        pairs = zip(self.kept, positions, strict=True)
        self.kept = [[kept[place] for place in places if place < len(kept)] for kept, places in pairs]
        self.factor *= factor

    def fit(self, before: Sequence[int], now: Sequence[int]) -> None:
        """Drops what parameters that had ``before`` rows, and have ``now``, cannot have kept."""
        of_all = zip(self.kept, before, now, strict=True)
        self.kept = [[place for place in kept if place < old][:size] for kept, old, size in of_all]


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
    # What brings the optimizer's state in step; the training sets it.
    state: Any = field(default=None, init=False, repr=False)
    # Since the optimizer's state followed, and since the listeners were told; None: nothing came or went.
    _rows: Rows | None = field(default=None, init=False, repr=False)
    _untold: Rows | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        #: What makes the update of the parameters.
        self.structure: Any = self.layer.structure
        #: The dimension of each parameter along which its rows lie.
        self.dims = tuple(self.structure.growing.get(name, 0) for name in self.structure.names)
        if not self.births:
            self.births = [[] for _ in self.structure.names]

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        """The parameters as the training sees them, in the order of ``structure.names``."""
        return self.layer.factors(self.adapter)

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """Those that the optimizer holds; others in the capacity form alone."""
        return self.layer.trained(self.adapter)

    @property
    def parameters(self) -> list[tuple[nn.Parameter, int, list[int]]]:
        """Each parameter, the dimension of its rows, and their births."""
        return list(zip(self.factors, self.dims, self.births, strict=True))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each parameter."""
        return tuple(map(Tensor.size, self.factors, self.dims))

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
        """Of the parameters that the optimizer holds those that are the first to get a gradient; none where
        all are."""
        config = self.layer.configs[self.adapter]
        named = dict(zip(self.structure.names, self.trained, strict=True))
        return [named[name] for name in self.structure.first_learners(self.layer.site, config)]

    def start(self) -> None:
        """Marks all rows as there from the start."""
        self.births = [[0] * size for size in self.sizes]
        self._rows = None

    def rescaled_by_growth(self, old_rank: int, rank: int) -> float:
        """What a change of the rank to ``rank`` multiplies the old rows of rescaled parameters by."""
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
        before, sizes = self.rank, self.sizes
        self.structure.grow(self.layer, self.adapter, components, generator, directions)
        self._note([range(size) for size in sizes], sizes, self.rescaled_by_growth(before, self.rank))

    def shrink(self, keep: Sequence[int]) -> None:
        """Keeps of the active components those at the positions ``keep``, ascending, where the structure can
        shrink; :meth:`follow` comes after, and a growth may come before it."""
        before, sizes = self.rank, self.sizes
        self.structure.shrink(self.layer, self.adapter, keep)
        # Those in reserve stay.
        stay = [[*keep, *range(before, size)] for size in sizes]
        self._note(stay, sizes, self.rescaled_by_growth(before, self.rank))

    def set_reserve(self, components: int, generator: torch.Generator | None = None) -> None:
        """Draws, or drops, components in reserve; :meth:`follow` comes after."""
        sizes = self.sizes
        self.structure.set_reserve(self.layer, self.adapter, components, generator)
        self._note([range(size) for size in self.sizes], sizes)

    def _note(self, stay: Sequence[Iterable[int]], sizes: Sequence[int], factor: float = 1.0) -> None:
        """Of parameters that had ``sizes`` rows those at the positions ``stay`` are still there."""
        if self._rows is None:
            self._rows = Rows.of(sizes)
        self._rows.then(stay, factor)

    def follow(self, step: int, counted: int | None = None) -> None:
        """Brings births and optimizer state in step with the parameters; new rows are born now.

        Args:
            counted: Steps that the optimizer has counted, for a parameter that had no row before; None: it
                counts those from now on.
        """
        sizes = tuple(map(len, self.births))
        known = self._rows is not None
        if not known and sizes == self.sizes:
            return
        rows = self._rows or Rows.of(sizes)
        # Loading gives other sizes without a word.
        rows.fit(sizes, self.sizes)
        named = zip(self.structure.names, self.parameters, rows.kept, strict=True)
        for name, (parameter, dim, births), kept in named:
            rescaled = rows.factor if name in self.structure.rescaled else 1.0
            old, size = len(births), int(parameter.shape[dim])
            at_the_end = kept == list(range(min(old, size)))
            # State that did not have to follow stays, whatever it is.
            if not kept and size:
                self.state.start_anew(parameter, counted)
            elif old != size or not at_the_end or rescaled != 1.0:
                self.state.resize_state(parameter, dim, rescaled, None if at_the_end else kept)
            elif known:
                self.state.keep_state(parameter)
            births[:] = [*(births[place] for place in kept), *[step] * (size - len(kept))]
        if self._untold is None:
            self._untold = Rows.of(sizes)
        self._untold.then(rows.kept, rows.factor)
        self._rows = None

    def told(self, sizes: tuple[int, ...], *, followed: bool) -> Rows | None:
        """What became of the rows since the last call, when the parameters had ``sizes`` rows; None: all are
        there, and no others. ``followed``: has :meth:`follow` come after all that changed them?"""
        untold, self._untold = self._untold, None
        if untold is None and (followed or sizes == self.sizes):
            return None
        rows, now = untold or Rows.of(sizes), self.sizes
        # A state that was resumed since has sizes of its own.
        rows.fit(sizes, now)
        return rows if sizes != now or tuple(map(len, rows.kept)) != sizes else None


def adapted_modules(model: nn.Module, adapter: str) -> list[AdaptedModule]:
    """The modules with adapter ``adapter``, in model order."""
    layers = adapted_layers(model, adapter)
    return [AdaptedModule(short(name), layer, adapter) for name, layer in layers.items()]
