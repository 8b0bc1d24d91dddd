"""``s B diag(E) A``: components, each a row of A, a column of B and a number of E, that may come and go.

Further rows of A and columns of B may be in reserve: they learn, with the constant ``RESERVE_E`` in the place
of E, before they count (section 3.3 of arXiv 2308.12043).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._core import RESERVE_E
from ..contract.structure import SizeMismatchError, Structure, matrix_sizes
from ..layers import AdaptedLayer
from ..ops.update import LowRank
from ..resizing.graph import may_differ
from ..resizing.parameter import append, select
from ..support import arguments
from ..support.sites import Site

_PAPER_STD = 0.02

Parameters = Mapping[str, Tensor]


class Components(Structure):
    """A (rows, in), B (out, rows), E (rank, 1), rows = rank + components in reserve; the rank may be 0."""

    names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_E")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "convolution"})
    growing: ClassVar[Mapping[str, int]] = {"lora_A": 0, "lora_B": 1, "lora_E": 0}
    least_rank: ClassVar[int] = 0
    active_only: ClassVar[frozenset[str]] = frozenset({"lora_E"})
    rescaled: ClassVar[frozenset[str]] = frozenset({"lora_E"})
    silencing: ClassVar[frozenset[str]] = frozenset({"lora_B"})
    direct: ClassVar[bool] = True

    def shapes(self, site: Site, rank: int, config: Any) -> dict[str, tuple[int, ...]]:
        """E first: its size is the rank."""
        return {"lora_E": (rank, 1), "lora_A": (rank, site.features), "lora_B": (site.out, rank)}

    def draw(
        self, site: Site, rank: int, config: Any, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """LoRA's initialisation with E 1, or with ``init_lora_weights="svd"`` the paper's."""
        # A generator is of the CPU; without one, the default device holds (meta while loading).
        device = None if generator is None else generator.device
        a = torch.empty(rank, site.features, device=device)
        b = torch.zeros(site.out, rank, device=device)
        svd = self.is_svd(config)
        e = (torch.zeros if svd else torch.ones)(rank, 1, device=device)
        if svd:
            a.normal_(0.0, _PAPER_STD, generator=generator)
            b.normal_(0.0, _PAPER_STD, generator=generator)
        elif site.family == "embedding":
            _fill_embedding(a, b, config, generator)
        else:
            _fill(a, b, config, generator)
        if site.padding is not None:
            # It gets no gradient: where A were not 0 there, it would move with B.
            a[:, site.padding] = 0.0
        return {"lora_A": a, "lora_B": b, "lora_E": e}

    def is_svd(self, config: Any) -> bool:
        """Are the first values the paper's: A and B small and random, E 0?"""
        return bool(config.init_lora_weights == "svd")

    def first_learners(self, site: Site, config: Any) -> tuple[str, ...]:
        """The factor that starts at 0; none where all are random."""
        if config.init_lora_weights is False:
            return ()
        if self.is_svd(config):
            return ("lora_E",)
        return ("lora_A",) if site.family == "embedding" else ("lora_B",)

    def update(
        self, parameters: Parameters, site: Site, config: Any, scale: Any, *, training: bool
    ) -> LowRank:
        """In training with the reserve, which learns; else of the active components."""
        a, b, e = (parameters[name] for name in self.names)
        return LowRank(a, b, e, scale) if training else LowRank(*_active(a, b, e), scale)

    def rank_of(self, parameters: Parameters) -> int:
        """Number of active components."""
        return parameters["lora_E"].shape[0]

    def sizes(self, parameters: Parameters, config: Any, name: str) -> tuple[int, int]:
        """Those of A and B.

        Raises:
            ValueError: they are no matrices.
        """
        return matrix_sizes(name, parameters["lora_A"], parameters["lora_B"])

    def of_low_rank(self, a: Tensor, b: Tensor, e: Tensor) -> dict[str, Tensor]:
        """The factors themselves."""
        return {"lora_A": a, "lora_B": b, "lora_E": e}

    def to_save(self, name: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The active components.

        Raises:
            ValueError: A, B and E are of different ranks, or parts that several processes hold.
        """
        super().to_save(name, parameters)
        a, b, e = (parameters[factor] for factor in self.names)
        rank, rows = e.shape[0], a.shape[0]
        if b.shape[1] != rows or not self.least_rank <= rank <= rows:
            raise SizeMismatchError(
                f"size mismatch: module {name!r} has lora_A of shape {tuple(a.shape)}, lora_B of "
                f"{tuple(b.shape)} and lora_E of {tuple(e.shape)}, which are of different ranks, so nothing "
                "was saved. What gave them new values must give them to all three, as load_state_dict() does."
            )
        return {"lora_A": a[:rank].contiguous(), "lora_B": b[:, :rank].contiguous(), "lora_E": e}

    def may_take(self, site: Site, shapes: Mapping[str, tuple[int, ...]], config: Any) -> bool:
        """Any rank, and any reserve."""
        a, b, e = (shapes[name] for name in self.names)
        if len(a) != 2 or len(e) != 2 or a[1] != site.features or b != (site.out, a[0]):
            return False
        return e[1] == 1 and self.least_rank <= e[0] <= a[0]

    # Growing and shrinking, of one adapter of a layer.

    def reserve(self, layer: AdaptedLayer, adapter: str) -> int:
        """Number of components in reserve."""
        a, _, e = layer.factors(adapter)
        return int(a.shape[0] - e.shape[0])

    def grow(
        self,
        layer: AdaptedLayer,
        adapter: str,
        components: int,
        generator: torch.Generator,
        directions: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Makes ``components`` more components active: first those in reserve, then new ones.

        Parameters keep their identity and lose their ``grad``; new rows stand at the end. ``directions``
        holds unit vectors, columns (out, n) and rows (n, in), that the first n new components take, each as
        long as its random one is.

        Raises:
            ValueError: the adapter is merged, or the rank would pass min(in, out).
        """
        if adapter in layer.merged_adapters:
            raise ValueError(
                f"adapter {adapter!r} is merged into the base weight and cannot grow; call "
                "unmerge_adapter() first."
            )
        old_rank = layer.rank(adapter)
        rank = old_rank + components
        if rank > layer.largest_rank:
            raise ValueError(
                f"components={components}: rank {rank} would be more than min(in, out) = "
                f"{layer.largest_rank}; give {layer.largest_rank - old_rank} or fewer."
            )
        from_reserve = min(components, self.reserve(layer, adapter))
        config = layer.configs[adapter]
        drawn = self.draw(layer.site, components - from_reserve, config, generator)
        if directions is not None:
            _point(drawn["lora_B"], directions[0], 0)
            _point(drawn["lora_A"], directions[1], 1)
        reserve_e = torch.full((from_reserve, 1), RESERVE_E, device=generator.device)
        a, b, e = layer.factors(adapter)
        rescaled = self.rescaled_by_growth(config, layer.lora_alpha[adapter], old_rank, rank)
        if rescaled != 1.0:
            with torch.no_grad():
                e.mul_(rescaled)
        append(a, drawn["lora_A"], 0)
        append(b, drawn["lora_B"], 1)
        append(e, torch.cat([reserve_e, drawn["lora_E"]]), 0)

    def shrink(self, layer: AdaptedLayer, adapter: str, keep: Sequence[int]) -> None:
        """Keeps of the active components those at the positions ``keep``; those in reserve stay.

        The update loses exactly the shares ``s b_i e_i a_i^T`` of the components i that go: under
        ``scaling="rank"``, with ``preserve_output``, E is rescaled for the scale s of the new rank, as at a
        growth. Parameters keep their identity and lose their ``grad``.

        Args:
            keep: Positions among the active components, ascending.

        Raises:
            ValueError: the adapter is merged, or ``keep`` has positions that are not there, or not in order.
            TypeError: ``keep`` holds something else than whole numbers.
        """
        if adapter in layer.merged_adapters:
            raise ValueError(
                f"adapter {adapter!r} is merged into the base weight and cannot shrink; call "
                "unmerge_adapter() first."
            )
        rank = layer.rank(adapter)
        kept = arguments.positions("keep", keep, rank, "components")
        if len(kept) == rank:
            return
        a, b, e = layer.factors(adapter)
        rows = [*kept, *range(rank, int(a.shape[0]))]
        select(a, rows, 0)
        select(b, rows, 1)
        select(e, kept, 0)
        rescaled = self.rescaled_by_growth(layer.configs[adapter], layer.lora_alpha[adapter], rank, len(kept))
        if rescaled != 1.0:
            with torch.no_grad():
                e.mul_(rescaled)

    def rescaled_by_growth(self, config: Any, alpha: float, old_rank: int, rank: int) -> float:
        """What a change of the rank from ``old_rank`` to ``rank`` multiplies the old rows of E by."""
        # Of rank 0 there is no old row, and no scale.
        if not config.preserve_output or 0 in (old_rank, rank):
            return 1.0
        return float(config.scale(alpha, old_rank) / config.scale(alpha, rank))

    def set_reserve(
        self, layer: AdaptedLayer, adapter: str, components: int, generator: torch.Generator | None = None
    ) -> None:
        """Draws, or drops, components so that ``components`` are in reserve."""
        rows = layer.rank(adapter) + components
        a, b, _ = layer.factors(adapter)
        missing = rows - int(a.shape[0])
        if missing > 0:
            drawn = self.draw(layer.site, missing, layer.configs[adapter], generator)
            self.add_reserve(layer, adapter, drawn["lora_A"], drawn["lora_B"])
        elif missing < 0:
            select(a, range(rows), 0)
            select(b, range(rows), 1)

    def in_reserve(self, layer: AdaptedLayer, adapter: str) -> list[Tensor]:
        """Copies of the components in reserve: A (n, in), B (out, n)."""
        a, b, e = (parameter.detach() for parameter in layer.factors(adapter))
        rank = e.shape[0]
        return [a[rank:].clone(), b[:, rank:].clone()]

    def add_reserve(self, layer: AdaptedLayer, adapter: str, a: Tensor, b: Tensor) -> None:
        """Puts given components in reserve: A (n, in), B (out, n)."""
        own_a, own_b, _ = layer.factors(adapter)
        append(own_a, a, 0)
        append(own_b, b, 1)


class FixedComponents(Components):
    """Components of which none comes or goes while they are trained."""

    growing: ClassVar[Mapping[str, int]] = {}
    least_rank: ClassVar[int] = 1

    def may_take(self, site: Site, shapes: Mapping[str, tuple[int, ...]], config: Any) -> bool:
        """No other sizes."""
        return False


def _active(a: Tensor, b: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without the reserve: views."""
    rank = e.shape[0]
    if may_differ(a.shape[0], rank):
        return a[:rank], b[:, :rank], e
    return a, b, e


def _fill(a: Tensor, b: Tensor, config: Any, generator: torch.Generator | None) -> None:
    """LoRA's initialisation of A, in place; B, which is 0, stays so unless the config wants it random."""
    if config.init_lora_weights == "gaussian":
        # LoRA divides by the rank; the rank at the end is r, and that of a component of its own 1.
        a.normal_(0.0, 1.0 / max(config.r, 1), generator=generator)
        return
    bound = 1.0 / math.sqrt(a.shape[1])
    a.uniform_(-bound, bound, generator=generator)
    if config.init_lora_weights is False:
        b.uniform_(-bound, bound, generator=generator)


def _fill_embedding(a: Tensor, b: Tensor, config: Any, generator: torch.Generator | None) -> None:
    """As in LoRA, A starts at 0 and B random."""
    if config.init_lora_weights is False:
        a.normal_(generator=generator)
    else:
        a.zero_()
    b.normal_(generator=generator)


def _point(drawn: Tensor, directions: Tensor, dim: int) -> None:
    """Gives vectors that lie along ``dim`` new directions, the first ones, and leaves their lengths."""
    n = min(drawn.shape[1 - dim], directions.shape[1 - dim])
    first = drawn.narrow(1 - dim, 0, n)
    given = directions.narrow(1 - dim, 0, n).to(device=drawn.device, dtype=drawn.dtype)
    first.copy_(given * first.norm(dim=dim, keepdim=True))
