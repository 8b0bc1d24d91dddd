"""PRILoRA (arXiv 2401.11316): ranks that rise with depth, and an A that is pruned all through the training by
the size of its entries times how much goes in at them.

``dW_l = s_l B A`` with ``r_l = round(r_s + (r_f - r_s) (l - 1) / (L - 1))`` in layer l of L.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from .. import _core
from ..contract.config import WITH_DORA, MethodConfig
from ..contract.method import Method
from ..contract.policy import AdaptedModule, Event, Plan, Policy, Step
from ..contract.structure import matrix_sizes
from ..gauges import Energy
from ..ops.update import LowRank
from ..support import arguments
from ..support.names import rank_pattern
from ..support.sites import Site, depths
from .two_factors import TwoFactors


@dataclass
class PriLoraConfig(MethodConfig):
    """Configuration of PRILoRA (arXiv 2401.11316), in place of ``peft.LoraConfig``.

    The authors published no code, and the text of their paper could not be had: what is marked *unverified*
    is a recollection, not a fact, and is an argument for that reason. It needs ``IncreLoraCallback`` or
    ``attach``, which prune.

    Args:
        r: The average rank of the adapted modules, which is that of the first layer and the last one: with as
            many modules in each layer, all together train as many numbers as ``LoraConfig(r=r)`` does.
        r_s: Rank in the first adapted layer, from 1 to ``r``; None: half of ``r``, rounded up (*unverified*:
            4 for 8).
        r_f: Rank in the last one; None: ``2 r - r_s`` (*unverified*: 12 for 8), and it can be nothing else.
            In between ranks are rounded, a half to the even number, which keeps their sum. A stack of layers
            of its own, as of an encoder beside a decoder, rises by itself; in a stack of which one layer is
            adapted, and outside of stacks, the rank is ``r``. ``rank_pattern`` comes before all of that.
        beta: Decay of the running norm ``v <- beta v + (1 - beta) n`` of a module's input, in [0, 1)
            (*unverified*: 0.9). ``n_j`` is the root mean square of feature j, before dropout, over the tokens
            of a step that a gradient reaches, in all processes: not over padding.
        prune_every: Optimizer steps from one pruning to the next, 1 or more (*unverified*: 40).
        prune_share: Part of the entries of A that a pruning sets to 0, the smallest by ``|A_ij| v_j``, from 0
            to 1, and not 1 (*unverified*: 0.5). They are trained on, and come back with the next step.
        prune_group: Among which entries the smallest are looked for: of a "row" of A (*unverified*), or of
            the whole "matrix", where a component may go as a whole, for a while.
        prune_last: Prune after the last step, too, so that the trained A is sparse; it needs the number of
            steps, which the callback knows.
        prune_moments: The optimizer's moments of what is pruned: "keep" (*unverified*), or "zero".
        scaling: The scale s_l: "rank": ``lora_alpha / r_l``; "average": ``lora_alpha / r`` everywhere. Which
            of them the authors take is *unverified*. With ``use_rslora=True`` over the root of either.
        init_lora_weights: True: LoRA's own, A Kaiming uniform and B 0. False: both random, so that a fresh
            adapter is not the identity (for tests).

    The other arguments are LoraConfig's: ``target_modules``, ``lora_alpha``, ``lora_dropout``, ``bias``,
    ``use_rslora``, ``modules_to_save``, ``trainable_token_indices``, ``exclude_modules``,
    ``layers_to_transform``, ``layers_pattern``, ``rank_pattern`` (in a saved adapter it has every rank),
    ``alpha_pattern``, ``use_dora``, ``fan_in_fan_out`` (set by itself where it is needed), ``task_type``,
    ``inference_mode``. Linear layers can be adapted.

    Raises:
        ValueError: an argument has a wrong value, or is an option of LoraConfig that is not supported; the
            message names it.
        TypeError: an argument has a wrong type.
    """

    supported: ClassVar[frozenset[str]] = WITH_DORA

    lora_alpha: int = field(default=16, metadata={"help": "The scale is lora_alpha over the rank."})
    r_s: int | None = field(default=None, metadata={"help": "Rank in the first adapted layer."})
    r_f: int | None = field(default=None, metadata={"help": "Rank in the last one, 2 r - r_s."})
    beta: float = field(default=0.9, metadata={"help": "Decay of the running norm of the input."})
    prune_every: int = field(default=40, metadata={"help": "Steps from one pruning to the next."})
    prune_share: float = field(default=0.5, metadata={"help": "Part of A that a pruning sets to 0."})
    prune_group: Literal["row", "matrix"] = field(
        default="row", metadata={"help": "Among which entries the smallest are looked for."}
    )
    prune_last: bool = field(default=False, metadata={"help": "Prune after the last step, too."})
    prune_moments: Literal["keep", "zero"] = field(
        default="keep", metadata={"help": "The optimizer's moments of what is pruned."}
    )
    scaling: Literal["rank", "average"] = field(
        default="rank", metadata={"help": "alpha / r_l ('rank') or alpha / r ('average')."}
    )
    init_lora_weights: bool = field(
        default=True, metadata={"help": "True: B starts at 0. False: both random.", "lora_variants": ()}
    )

    def check(self) -> None:
        """Checks the ranks and the pruning."""
        arguments.integer("r_s", self.r_s, at_least=1, optional=True)
        arguments.integer("r_f", self.r_f, at_least=1, optional=True)
        first, last = self.ends()
        if not 1 <= first <= last:
            raise ValueError(
                f"r_s={self.r_s}, r_f={self.r_f}: ranks would go from {first} to {last}, but they rise, from "
                f"1 or more; with r={self.r} give an r_s from 1 to {self.r}, and leave r_f out."
            )
        if first + last != 2 * self.r:
            raise ValueError(
                f"r_s={self.r_s} and r_f={self.r_f} have an average of {(first + last) / 2:g}, and r="
                f"{self.r}; leave r_s or r_f out, or give the r that is their average."
            )
        arguments.number("beta", self.beta, at_least=0.0, below=1.0)
        arguments.integer("prune_every", self.prune_every, at_least=1)
        arguments.number("prune_share", self.prune_share, at_least=0.0, below=1.0)
        arguments.choice("prune_group", self.prune_group, ("row", "matrix"))
        arguments.choice("prune_last", self.prune_last, (True, False))
        arguments.choice("prune_moments", self.prune_moments, ("keep", "zero"))
        arguments.choice("scaling", self.scaling, ("rank", "average"))

    def ends(self) -> tuple[int, int]:
        """r_s and r_f, where they are left out too."""
        if self.r_s is not None:
            return self.r_s, 2 * self.r - self.r_s if self.r_f is None else self.r_f
        if self.r_f is not None:
            return 2 * self.r - self.r_f, self.r_f
        first = math.ceil(self.r / 2)
        return first, 2 * self.r - first

    def resolved(self) -> dict[str, Any]:
        """r_s and r_f."""
        return dict(zip(("r_s", "r_f"), self.ends(), strict=True))

    def prepare(self, modules: Sequence[str], model: Any) -> None:
        """Writes the rank of every module into ``rank_pattern``."""
        places, ends = depths(modules), self.ends()
        found = {name: self.r if place is None else rising(*ends, *place) for name, place in places.items()}
        asked = {name: get_pattern_key(self.rank_pattern.keys(), name) for name in modules}
        self.rank_pattern = rank_pattern(
            {name: self.rank_pattern.get(asked[name], rank) for name, rank in found.items()}
        )

    def divisor(self, rank: int) -> float:
        """The module's rank, or the average."""
        return super().divisor(rank if self.scaling == "rank" else self.r)

    def of_sum(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Every module at scale 1."""
        r = max(round(sum(ranks.values()) / len(ranks)), 1)
        return {"r": r, "r_s": None, "r_f": None, "lora_alpha": r, "scaling": "average"}


def rising(first: int, last: int, place: int, count: int) -> int:
    """The rank in layer ``place``, from 0, of ``count`` whose ranks rise evenly from ``first`` to ``last``;
    of one alone the average.

    As whole numbers, a half to the even one: in layers as far from the first as from the last ranks then add
    up to ``first + last``, which is an even number.
    """
    if count == 1:
        return round(Fraction(first + last, 2))
    return round(first + Fraction((last - first) * place, count - 1))


class Factors(TwoFactors):
    """A (r, in) and B (out, r), as LoRA has them."""

    def shapes(self, site: Site, rank: int, config: PriLoraConfig) -> dict[str, tuple[int, ...]]:
        """Of a linear layer."""
        return {"lora_A": (rank, site.features), "lora_B": (site.out, rank)}

    def update(
        self,
        parameters: Mapping[str, Tensor],
        site: Site,
        config: PriLoraConfig,
        scale: Any,
        *,
        training: bool,
    ) -> LowRank:
        """``s B A``."""
        a, b = parameters["lora_A"], parameters["lora_B"]
        return LowRank(a, b, a.new_ones(a.shape[0], 1), scale)

    def sizes(self, parameters: Mapping[str, Tensor], config: PriLoraConfig, name: str) -> tuple[int, int]:
        """Those of A and B.

        Raises:
            ValueError: they are no matrices.
        """
        return matrix_sizes(name, parameters["lora_A"], parameters["lora_B"])

    def of_low_rank(self, a: Tensor, b: Tensor, e: Tensor) -> dict[str, Tensor]:
        """The factors, E in B."""
        return {"lora_A": a, "lora_B": b * e.view(-1)}


class Pruning(Policy):
    """Follows the norm of each module's input, and prunes every A by it.

    Args:
        modules, config, plan: As for :class:`Policy`.

    Raises:
        ValueError: the number of steps is not known but needed.
    """

    gauge: Energy

    def __init__(self, modules: Sequence[AdaptedModule], config: PriLoraConfig, plan: Plan) -> None:
        super().__init__(modules, config, plan)
        if config.prune_last and plan.total_steps is None:
            raise ValueError(
                "total_steps=None: prune_last=True prunes after the last step, whose number is not known; "
                "give attach(..., total_steps=...)."
            )
        self._a: list[Tensor] = [module.factors[0] for module in modules]
        self._features = [int(a.shape[1]) for a in self._a]
        self.gauge = Energy.of(self._features, plan.device)
        self._norms = torch.zeros(sum(self._features), dtype=torch.float64, device=plan.device)
        self._moments_checked = False

    def start(self) -> None:
        """Nothing has gone in yet."""
        self._norms.zero_()

    def before_step(self, step: Step) -> None:
        """Drops what a batch gave whose step a fused optimizer will not take."""
        if step.found_inf is not None:
            total = self.gauge.total
            total.masked_fill_(step.found_inf.reshape(()).to(total.device) > 0, 0.0)

    def after_step(self, step: Step) -> Event | None:
        """Takes the step's inputs in; prunes if it is time."""
        if step.armed:
            _core.average_energy_(self._norms, self.gauge.total, self._features, self.config.beta)
        forgets = self.config.prune_moments == "zero"
        if forgets and not self._moments_checked:
            # Now that there are any: the first pruning may be hours away.
            list(self._moments(self._a))
            self._moments_checked = True
        last = self.config.prune_last and step.number == self.plan.total_steps
        if last or step.number % self.config.prune_every == 0:
            pruned = self._prune()
            if forgets:
                for a, moments in self._moments(pruned):
                    moments.masked_fill_(a == 0, 0.0)
        return None

    def _prune(self) -> list[Tensor]:
        """Prunes the matrices of which it is known what goes in: where nothing did, the first columns would
        go, whatever they are worth."""
        norms = self._norms.split(self._features)
        known = torch.stack([of_one.any() for of_one in norms]).tolist()
        a = [a for a, is_known in zip(self._a, known, strict=True) if is_known]
        if a:
            of_all = torch.cat([of_one for of_one, is_known in zip(norms, known, strict=True) if is_known])
            by_row = self.config.prune_group == "row"
            _core.prune_(a, of_all, self.config.prune_share, by_row=by_row)
        return a

    def _moments(self, of: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The optimizer's moments of matrices A, each with its A.

        Raises:
            ValueError: they are not a number for each entry.
        """
        optimizer = self.plan.optimizer
        for a in of:
            for name, value in optimizer.state.get(a, {}).items():
                if not isinstance(value, Tensor) or value.dim() == 0:
                    continue
                if value.shape != a.shape or not value.is_floating_point():
                    raise ValueError(
                        f"prune_moments='zero': {type(optimizer).__name__} keeps {name!r} of shape "
                        f"{tuple(value.shape)} and dtype {value.dtype} for a lora_A of {tuple(a.shape)}, not "
                        "a number for each entry; leave prune_moments at 'keep', or use AdamW."
                    )
                yield a, value

    def scores(self) -> npt.NDArray[np.float64]:
        """``sum |A_ij| v_j`` of every module."""
        parts = zip(self._a, self._norms.split(self._features), strict=True)
        sums = [(a.detach().double().abs() @ norms.to(a.device)).sum() for a, norms in parts]
        scores: npt.NDArray[np.float64] = torch.stack([value.cpu() for value in sums]).numpy()
        return scores

    def logs(self) -> dict[str, float]:
        """The part of A's entries that are 0."""
        zeros = sum(a.numel() - int(torch.count_nonzero(a)) for a in self._a)
        return {"pruned": zeros / sum(a.numel() for a in self._a)}

    def state_dict(self) -> dict[str, Any]:
        """The running norms."""
        return {"norms": self._norms.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them.

        Raises:
            ValueError: they are of modules of other sizes.
        """
        norms = state["norms"]
        if norms.shape != self._norms.shape:
            raise ValueError(
                f"optimizer: its scheduler's state is of modules with {len(norms)} input features in all, "
                f"but the adapter's have {len(self._norms)}; resume with the base model that was trained."
            )
        self._norms.copy_(norms)


METHOD = Method(
    name="prilora",
    title="PRILoRA",
    config=PriLoraConfig,
    structure=Factors(),
    policy=Pruning,
    summary="A LoRA whose ranks rise with depth, and whose A was pruned during training",
    paper="https://arxiv.org/abs/2401.11316",
)
