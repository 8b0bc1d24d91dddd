"""How a method builds the update of a module: its parameters, their first values, what they amount to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.update import Update
from ..support.sites import Site


class SizeMismatchError(ValueError, RuntimeError):
    """Tensors do not fit the model: bad input to this library, and a RuntimeError where torch tells it."""


class Structure(ABC):
    """How the update of a module is made of parameters.

    It holds no state: the layer holds the parameters, for each adapter one by each of ``names``, and hands
    them over as a dictionary.
    """

    #: Of the parameters, as files and optimizers have them: ``lora_A`` stands for ``lora_A.ADAPTER.weight``.
    #: All begin with "lora_", and "lora_A" is one: PEFT finds adapters by it.
    names: ClassVar[tuple[str, ...]]
    #: What can be adapted: "linear", "embedding", "convolution".
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    #: The parameters that may change their size, and along which dimension.
    growing: ClassVar[Mapping[str, int]] = {}
    #: The smallest rank of a module; 0 where it may have nothing.
    least_rank: ClassVar[int] = 1
    #: Those that have a row for each active component, and none for components in reserve.
    active_only: ClassVar[frozenset[str]] = frozenset()
    #: Those whose old rows a growth may rescale, so that it leaves the update as it is.
    rescaled: ClassVar[frozenset[str]] = frozenset()
    #: Those in which a component whose row is 0 does nothing.
    silencing: ClassVar[frozenset[str]] = frozenset()
    #: Are they one set for all modules of an adapter: drawn for the first, and saved under its name alone?
    shared: ClassVar[bool] = False
    #: Is the update of a training pass a :class:`~increlora_rs.ops.update.LowRank` of the three parameters of
    #: ``names``, A, B and E, as they are? A linear layer then makes no update of them first.
    direct: ClassVar[bool] = False
    #: Are components masked that go on learning, so that more may act than the last event has left?
    masks: ClassVar[bool] = False
    #: What is saved beside the parameters and changed by the policy alone, under configurations for which
    #: :meth:`keeps`; named as they are.
    kept_names: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def shapes(self, site: Site, rank: int, config: Any) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters of a module of rank ``rank``, in the order of the checks; each of two
        dimensions or more, for what has fewer is taken for a part that another process has the rest of. With
        those of :meth:`kept`, where there are any."""

    @abstractmethod
    def draw(
        self, site: Site, rank: int, config: Any, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """First values, float32. The update they make is 0, and some of its gradients are not.

        Args:
            generator: Of the CPU; None: torch's own, on torch's default device (meta while loading).
        """

    @abstractmethod
    def update(
        self, parameters: Mapping[str, Tensor], site: Site, config: Any, scale: Any, *, training: bool
    ) -> Update:
        """The update in one forward pass, or in a saved adapter.

        Args:
            parameters: Those of ``names``, of :meth:`kept` and of :meth:`frozen`.
            scale: What it is multiplied by: a number, or in a compiled graph float64 (1).
            training: Is it a forward pass in training?
        """

    @abstractmethod
    def rank_of(self, parameters: Mapping[str, Tensor]) -> int:
        """The rank that the parameters' shapes tell; in a graph a size that it does not know."""

    @abstractmethod
    def sizes(self, parameters: Mapping[str, Tensor], config: Any, name: str) -> tuple[int, int]:
        """The size (out, in) of module ``name`` as a saved adapter alone tells it.

        Raises:
            ValueError: it does not tell it.
        """

    def frozen(self, site: Site, config: Any) -> dict[str, Tensor]:
        """What belongs to the update and is not trained: made anew from a seed, never saved. By name."""
        return {}

    def check_shared(self, site: Site, rank: int, config: Any, shared: Mapping[str, Tensor]) -> None:
        """Raises unless a module can take the parameters that the adapter's first module has.

        Raises:
            ValueError: it needs others; the message goes on after the module's name.
        """
        wanted = self.shapes(site, rank, config)
        for name, tensor in shared.items():
            if tuple(tensor.shape) != wanted[name]:
                raise ValueError(
                    f"{name}, one for all adapted modules, has shape {tuple(tensor.shape)} by the first of "
                    f"them, and a module of {site.features} to {site.out} features needs {wanted[name]}; "
                    "leave it out of target_modules"
                )

    def spread(self, found: dict[str, dict[str, Tensor]], config: Any) -> dict[str, dict[str, Tensor]]:
        """The parameters of every module by its name, of those that a file has; where they are shared, it has
        them once.

        Raises:
            ValueError: they are not those of the configuration's modules.
        """
        return found

    def keeps(self, config: Any) -> bool:
        """Are there tensors of ``kept_names``?"""
        return False

    def kept(self, site: Site, rank: int, config: Any) -> dict[str, Tensor]:
        """First values of ``kept_names``, where :meth:`keeps`; on torch's default device."""
        return {}

    def saved_names(self, config: Any) -> tuple[str, ...]:
        """What an adapter's file has of every module: ``names``, and ``kept_names`` where there are any."""
        return (*self.names, *self.kept_names) if self.keeps(config) else self.names

    def of_low_rank(self, a: Tensor, b: Tensor, e: Tensor) -> dict[str, Tensor] | None:
        """Parameters whose update, at scale 1, is ``B diag(E) A``; None: there are none in general."""
        return None

    def to_save(self, name: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is saved of the parameters of module ``name``.

        Raises:
            ValueError: they do not fit each other, or are parts that several processes hold.
        """
        check_gathered(name, parameters, self.growing if self.least_rank == 0 else {})
        return parameters

    def acting(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of a trained adapter's parameters makes its update: for export and tables."""
        return parameters

    def first_learners(self, site: Site, config: Any) -> tuple[str, ...]:
        """The parameters that get a gradient in the first step; none where all do."""
        return ()

    def check(
        self, name: str, parameters: Mapping[str, Tensor], site: Site, config: Any, rank: int | None = None
    ) -> None:
        """Raises unless the tensors of a saved adapter are finite and fit the module.

        Args:
            rank: The rank that they must have; None: any, as far as they grow.

        Raises:
            SizeMismatchError: a shape is wrong.
            ValueError: a number is not finite.
        """
        found = self._rank(parameters) if rank is None else rank
        wanted = self.shapes(site, found, config)
        # Of a module that has nothing its own size tells whether it is one.
        of_one = self.shapes(site, max(found, 1), config)
        for parameter, shape in wanted.items():
            have = tuple(parameters[parameter].shape)
            if have != shape or 0 in of_one[parameter] or found < self.least_rank:
                raise SizeMismatchError(
                    f"size mismatch: {parameter} of module {name!r} has shape {have} in the adapter, but the "
                    f"model needs {shape}, with a rank of {self.least_rank} or more; the adapter was saved "
                    "from another base model, or is damaged."
                )
        check_finite(name, {parameter: parameters[parameter] for parameter in wanted})

    def rescaled_by_growth(self, config: Any, alpha: float, old_rank: int, rank: int) -> float:
        """What a growth from ``old_rank`` to ``rank`` multiplies the old rows of ``rescaled`` by."""
        return 1.0

    def may_take(self, site: Site, shapes: Mapping[str, tuple[int, ...]], config: Any) -> bool:
        """Can the parameters of a module take the sizes ``shapes``, as a checkpoint has them?"""
        return False

    def _rank(self, parameters: Mapping[str, Tensor]) -> int:
        try:
            return int(self.rank_of(parameters))
        except IndexError:
            # A tensor of no dimension.
            return 0


def matrix_sizes(name: str, a: Tensor, b: Tensor) -> tuple[int, int]:
    """The size (out, in) of module ``name`` by A (rank, in) and B (out, rank), as a file has them.

    Raises:
        ValueError: they are no matrices.
    """
    if a.dim() != 2 or b.dim() != 2:
        raise ValueError(
            f"model_or_adapter_dir: lora_A and lora_B of module {name!r} have shapes {tuple(a.shape)} and "
            f"{tuple(b.shape)}; they must be matrices."
        )
    return int(b.shape[0]), int(a.shape[1])


def check_gathered(name: str, parameters: Mapping[str, Tensor], may_be_empty: Mapping[str, int]) -> None:
    """Raises ValueError where parameters of module ``name`` are parts of what they should be.

    Args:
        may_be_empty: Those that have no element at rank 0, and along which dimension they have no size then.
    """

    def is_part(parameter: str, tensor: Tensor) -> bool:
        empty = [dim for dim, size in enumerate(tensor.shape) if size == 0]
        return tensor.dim() < 2 or (empty != [] and empty != [may_be_empty.get(parameter)])

    if any(is_part(parameter, tensor) for parameter, tensor in parameters.items()):
        shapes = " and ".join(
            f"{parameter} {tuple(tensor.shape)}" for parameter, tensor in parameters.items()
        )
        raise ValueError(
            f"the adapter of module {name!r} cannot be saved: its tensors have the shapes {shapes} in this "
            "process, as parts of a parameter that DeepSpeed ZeRO-3 or FSDP has split. Gather the "
            "parameters, as accelerator.get_state_dict(model) does, and give them to save_pretrained as "
            "state_dict."
        )


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless all numbers of module ``name`` are finite."""
    for parameter, tensor in tensors.items():
        if tensor.device.type != "meta" and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{parameter} of module {name!r} holds {bad} values that are NaN or infinite; the adapter "
                "is damaged, or its training diverged: take an earlier checkpoint."
            )
