"""LoRA-Mini (arXiv 2411.15804): each factor of LoRA is split in two, and the small inner halves are trained.

``dW = s B_aux B A A_aux`` with frozen ``A_aux`` (a, in) and ``B_aux`` (out, b), made anew from a seed, and
trained ``A`` (r, a) and ``B`` (b, r).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..contract.method import Method
from ..ops.autocast import without_autocast
from ..ops.update import LowRank
from ..support import arguments
from ..support.seeded import generator
from ..support.sites import Site
from .module_sizes import SizedConfig
from .two_factors import TwoFactors


@dataclass
class LoraMiniConfig(SizedConfig):
    """Configuration of LoRA-Mini (arXiv 2411.15804), in place of ``peft.LoraConfig``.

    A linear layer trains ``r (lora_a + lora_b)`` numbers, LoRA ``r (in + out)``.

    Args:
        r: Rank of the update, at most ``lora_a`` and ``lora_b``.
        lora_a: Rows of the frozen ``A_aux``, the size that the input is projected to.
        lora_b: Columns of the frozen ``B_aux``, the size that the output is projected from.
        lora_alpha: The scale is ``lora_alpha / r``; with ``use_rslora=True`` over the root of r.
        aux_init: What the frozen halves are. "scaled": ``A_aux ~ N(0, 1 / in)`` and ``B_aux ~ N(0, 1 /
            lora_b)``, which keep the variance of what passes. "orthonormal": orthonormal rows and columns, of
            the same mean square. "published": both N(0, 1), as the authors' code has them; activations grow
            by some sqrt(in), gradients by sqrt(out), and the learning rate has to fall with them.
        aux_seed: What they are drawn from, the same on every device, 0 or more. It is saved, they are not.
        init_lora_weights: True: ``A`` Kaiming uniform, ``B`` 0. False: both random, so that a fresh adapter
            is not the identity (for tests). The authors' code has both at 0, where no gradient ever reaches
            either; that is left out.
        module_sizes: Kept by the library, for the export of a saved adapter: out and in, by full module name.

    The other arguments are LoraConfig's: ``target_modules``, ``lora_dropout``, ``bias``, ``use_rslora``,
    ``modules_to_save``, ``trainable_token_indices``, ``exclude_modules``, ``layers_to_transform``,
    ``layers_pattern``, ``rank_pattern``, ``alpha_pattern``, ``fan_in_fan_out`` (set by itself where it is
    needed), ``task_type``, ``inference_mode``. Linear layers and convolutions can be adapted.

    Raises:
        ValueError: an argument has a wrong value, or is an option of LoraConfig that is not supported; the
            message names it.
        TypeError: an argument has a wrong type.
    """

    meaning: ClassVar[tuple[str, ...]] = ("aux_init", "aux_seed")

    lora_alpha: int = field(default=16, metadata={"help": "The scale is lora_alpha / r."})
    lora_a: int = field(default=32, metadata={"help": "Rows of the frozen half of A."})
    lora_b: int = field(default=32, metadata={"help": "Columns of the frozen half of B."})
    aux_init: Literal["scaled", "orthonormal", "published"] = field(
        default="scaled", metadata={"help": "What the frozen halves are."}
    )
    aux_seed: int = field(default=0, metadata={"help": "What the frozen halves are drawn from."})
    init_lora_weights: bool = field(
        default=True, metadata={"help": "True: B starts at 0. False: both random.", "lora_variants": ()}
    )

    @classmethod
    def options_beside_r(cls) -> Sequence[dict[str, Any]]:
        """Both inner sizes, doubled until the rank that is needed is not above them."""
        return [{"lora_a": cls.lora_a << k, "lora_b": cls.lora_b << k} for k in range(10)]

    def check(self) -> None:
        """Checks the sizes, the seed and the choices."""
        super().check()
        arguments.integer("lora_a", self.lora_a, at_least=1)
        arguments.integer("lora_b", self.lora_b, at_least=1)
        arguments.integer("aux_seed", self.aux_seed, at_least=0)
        arguments.choice("aux_init", self.aux_init, ("scaled", "orthonormal", "published"))
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if rank > min(self.lora_a, self.lora_b):
                raise ValueError(
                    f"{name}={rank} is above lora_a={self.lora_a} or lora_b={self.lora_b}, and no update has "
                    "a rank above either; lower the rank, or raise both."
                )


class SplitFactors(TwoFactors):
    """A (r, a) and B (b, r), within ``A_aux`` (a, in) and ``B_aux`` (out, b) that are not trained."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})

    def shapes(self, site: Site, rank: int, config: LoraMiniConfig) -> dict[str, tuple[int, ...]]:
        """Of the module's size they know nothing."""
        return {"lora_A": (rank, config.lora_a), "lora_B": (config.lora_b, rank)}

    def frozen(self, site: Site, config: LoraMiniConfig) -> dict[str, Tensor]:
        """``A_aux`` and ``B_aux``, float32."""
        a = _normal(site, config, "lora_A_aux", (config.lora_a, site.features))
        b = _normal(site, config, "lora_B_aux", (site.out, config.lora_b))
        if config.aux_init == "scaled":
            a, b = a / math.sqrt(site.features), b / math.sqrt(config.lora_b)
        elif config.aux_init == "orthonormal":
            # A square matrix's rows of mean square 1 / in, as above, and 1 / b.
            a = _orthonormal(a) * math.sqrt(max(1.0, config.lora_a / site.features))
            b = _orthonormal(b) * math.sqrt(max(site.out, config.lora_b) / config.lora_b)
        return {"lora_A_aux": a.float(), "lora_B_aux": b.float()}

    def update(
        self,
        parameters: Mapping[str, Tensor],
        site: Site,
        config: LoraMiniConfig,
        scale: Any,
        *,
        training: bool,
    ) -> LowRank:
        """``s (B_aux B) (A A_aux)``: from there on a LoRA of rank r."""
        a, b = parameters["lora_A"], parameters["lora_B"]
        aux_a, aux_b = (parameters[name].to(a.device, a.dtype) for name in ("lora_A_aux", "lora_B_aux"))
        with without_autocast(a.device.type):
            return LowRank(a @ aux_a, aux_b @ b, a.new_ones(a.shape[0], 1), scale)

    def sizes(self, parameters: Mapping[str, Tensor], config: LoraMiniConfig, name: str) -> tuple[int, int]:
        """Those that the configuration kept.

        Raises:
            ValueError: it has none of this module.
        """
        return config.size_of(name)


def _normal(site: Site, config: LoraMiniConfig, purpose: str, shape: tuple[int, int]) -> Tensor:
    drawn = generator(config.aux_seed, purpose, site.name, *shape)
    # In float64, where torch draws by the same steps on every processor.
    return torch.randn(shape, generator=drawn, dtype=torch.float64, device="cpu")


def _orthonormal(matrix: Tensor) -> Tensor:
    """A matrix with orthonormal rows or columns, whichever are fewer."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
    q, r = torch.linalg.qr(tall)
    # The signs are LAPACK's choice.
    q = q * r.diagonal().sign()
    return q if tall is matrix else q.t()


METHOD = Method(
    name="lora_mini",
    title="LoRA-Mini",
    config=LoraMiniConfig,
    structure=SplitFactors(),
    summary="A LoRA whose factors are split in two, of which only the small inner halves were trained",
    paper="https://arxiv.org/abs/2411.15804",
)
