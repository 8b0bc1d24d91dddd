"""MELoRA (arXiv 2402.17263): n small LoRAs, each from a slice of the input to the same slice of the output.

``dW = blockdiag(s B_i A_i)``, i = 1 .. n, with ``A_i`` (r, in / n) and ``B_i`` (out / n, r): rank n r for the
``r (in + out)`` numbers of one LoRA of rank r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..contract.config import MethodConfig
from ..contract.method import Method
from ..contract.structure import Structure
from ..ops.block_diagonal import BlockDiagonal
from ..support import arguments
from ..support.sites import Site


@dataclass
class MeLoraConfig(MethodConfig):
    """Configuration of MELoRA (arXiv 2402.17263), in place of ``peft.LoraConfig``.

    A linear layer trains ``r (in + out)`` numbers for any ``n_slices``, as LoRA of rank r does. The rank of
    its update, in tables and in the export, is ``n_slices * r``.

    Args:
        r: Rank of each small LoRA. The authors' code takes a list, a rank a slice; here all are of one.
        n_slices: Number n of slices of equal width, which has to divide in and out of every adapted module.
            With 1 it is LoRA.
        lora_alpha: The scale is ``lora_alpha / r``, by the small rank; with ``use_rslora=True`` over the root
            of r.
        init_lora_weights: True: every ``A_i`` Kaiming uniform over its ``in / n_slices`` inputs, ``B_i`` 0.
            False: both random, so that a fresh adapter is not the identity (for tests).

    The other arguments are LoraConfig's: ``target_modules``, ``lora_dropout`` (each element of the input by
    itself, so each slice has its own), ``bias``, ``use_rslora``, ``modules_to_save``,
    ``trainable_token_indices``, ``exclude_modules``, ``layers_to_transform``, ``layers_pattern``,
    ``rank_pattern``, ``alpha_pattern``, ``fan_in_fan_out`` (set by itself where it is needed), ``task_type``,
    ``inference_mode``. Linear layers can be adapted.

    Raises:
        ValueError: an argument has a wrong value, or is an option of LoraConfig that is not supported; the
            message names it.
        TypeError: an argument has a wrong type.
    """

    lora_alpha: int = field(default=16, metadata={"help": "The scale is lora_alpha / r."})
    n_slices: int = field(default=2, metadata={"help": "Number of small LoRAs of a module."})
    init_lora_weights: bool = field(
        default=True, metadata={"help": "True: every B starts at 0. False: both random.", "lora_variants": ()}
    )

    def check(self) -> None:
        """Checks the number of slices."""
        arguments.integer("n_slices", self.n_slices, at_least=1)

    def check_rank(self, site: Site, rank: int) -> None:
        """Refuses a module that the slices do not divide.

        Raises:
            ValueError: n_slices does not divide its in or its out.
        """
        n = self.n_slices
        if site.features % n or site.out % n:
            common = math.gcd(site.features, site.out)
            fitting = [size for size in range(1, min(common, 64) + 1) if common % size == 0]
            raise ValueError(
                f"n_slices={n} does not divide its {site.features} inputs and {site.out} outputs into equal "
                f"slices; give an n_slices that divides both, such as {fitting[-1]} (of {fitting}), or leave "
                "the module out of target_modules, by exclude_modules."
            )

    def rank_for(self, site: Site, rank: int) -> int:
        """The rank of all slices together.

        Raises:
            ValueError: as for :meth:`check_rank`.
        """
        self.check_rank(site, rank)
        return self.n_slices * rank

    def divisor(self, rank: int) -> float:
        """The rank of one slice, or its root."""
        return super().divisor(rank // self.n_slices)


class Slices(Structure):
    """A (n, r, in / n) and B (n, out / n, r), a matrix a slice."""

    names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def shapes(self, site: Site, rank: int, config: MeLoraConfig) -> dict[str, tuple[int, ...]]:
        """``rank`` is that of all slices together."""
        n = config.n_slices
        return {"lora_A": (n, rank // n, site.features // n), "lora_B": (n, site.out // n, rank // n)}

    def draw(
        self, site: Site, rank: int, config: MeLoraConfig, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """LoRA's initialisation of every slice by itself."""
        # A generator is of the CPU; without one, the default device holds (meta while loading).
        device = None if generator is None else generator.device
        shapes = self.shapes(site, rank, config)
        a, b = torch.empty(shapes["lora_A"], device=device), torch.zeros(shapes["lora_B"], device=device)
        # By torch's own function: of one slice they are LoRA's to the last bit.
        nn.init.kaiming_uniform_(a.flatten(0, 1), math.sqrt(5.0), generator=generator)
        if config.init_lora_weights is False:
            bound = 1.0 / math.sqrt(a.shape[-1])
            b.uniform_(-bound, bound, generator=generator)
        return {"lora_A": a, "lora_B": b}

    def first_learners(self, site: Site, config: MeLoraConfig) -> tuple[str, ...]:
        """B, as long as it is 0."""
        return ("lora_B",) if config.init_lora_weights else ()

    def update(
        self,
        parameters: Mapping[str, Tensor],
        site: Site,
        config: MeLoraConfig,
        scale: Any,
        *,
        training: bool,
    ) -> BlockDiagonal:
        """All slices."""
        return BlockDiagonal(parameters["lora_A"], parameters["lora_B"], scale)

    def rank_of(self, parameters: Mapping[str, Tensor]) -> int:
        """Rows of A in all slices."""
        a = parameters["lora_A"]
        return a.shape[0] * a.shape[1]

    def sizes(self, parameters: Mapping[str, Tensor], config: MeLoraConfig, name: str) -> tuple[int, int]:
        """Those of all slices.

        Raises:
            ValueError: A and B are no stacks of matrices.
        """
        a, b = parameters["lora_A"], parameters["lora_B"]
        if a.dim() != 3 or b.dim() != 3:
            raise ValueError(
                f"model_or_adapter_dir: lora_A and lora_B of module {name!r} have shapes {tuple(a.shape)} "
                f"and {tuple(b.shape)}; they must be stacks of matrices, of three dimensions."
            )
        return int(b.shape[0] * b.shape[1]), int(a.shape[0] * a.shape[2])


METHOD = Method(
    name="melora",
    title="MELoRA",
    config=MeLoraConfig,
    structure=Slices(),
    summary="Small LoRAs, each from a slice of a module's input to the same slice of its output",
    paper="https://arxiv.org/abs/2402.17263",
)
