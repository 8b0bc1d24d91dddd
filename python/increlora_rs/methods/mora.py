"""MoRA (arXiv 2405.12130): one square matrix between a fixed compression of the input and a fixed
decompression to the output; and ReMoRA, which merges it at intervals and goes on with another compression.

``dW = s D M C`` with M (q, q), ``q = floor(sqrt((in + out) r) + 1/2)``, types 1 to 4; type 6 turns blocks of
the input instead (:mod:`increlora_rs.ops.square` has all of them).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..contract.config import MethodConfig
from ..contract.method import Method
from ..contract.policy import AdaptedModule, Event, Plan, Policy, Step
from ..contract.structure import SizeMismatchError, Structure
from ..ops.square import ROTATION, Square
from ..ops.total import Total
from ..ops.update import Update
from ..support import arguments
from ..support.sites import Site

_TYPES = (1, 2, 3, 4, ROTATION)
_MERGED, _MERGES = "lora_merged", "lora_merges"
# The number of merges, the last digit first: numbers below it are exact in bfloat16, to which a model may be
# cast, and a whole number would not be a parameter like others.
_BASE, _DIGITS = 128, 4


@dataclass
class MoraConfig(MethodConfig):
    """Configuration of MoRA and ReMoRA (arXiv 2405.12130), in place of ``peft.LoraConfig``.

    A linear layer trains the q² numbers of a square matrix, as near to the ``r (in + out)`` of a LoRA as a
    square comes. ``q = floor(sqrt((in + out) r) + 1/2)``, of type 6 the next even number below; tables have
    it as the module's rank.

    Args:
        r: Rank of the LoRA that has as many parameters.
        lora_alpha: None: the scale is 1, as published. A number, as LoRA's: it is ``lora_alpha / r`` in every
            module; with ``use_rslora=True`` over the root of r. The authors' code takes a number and ignores
            it.
        mora_type: How inputs are compressed, and outputs made of what M gives. 1: sums of the inputs i mod q,
            outputs o mod q (the paper's eq. 6, for a large r). 2: sums of neighbours, repeated over
            neighbours. 3: sums of neighbours, outputs o mod q. 4: sums of the inputs i mod q, repeated over
            neighbours. 6: blocks of q inputs, each turned by angles of its own and multiplied by M (eq. 9,
            for a small r); no LoRA does the same, so it is not exported but merged. There is no type 5.
        fold_inputs: Of type 6, where a module has more blocks of inputs than of outputs. True: they go to the
            first blocks of outputs again. False, as published: they are ignored; from 3072 to 768 features at
            r 8 that are 2,202 of 3,072 inputs.
        remora_interval: ReMoRA: merge M every so many optimizer steps, begin anew with M 0, the next type and
            no optimizer state. None: MoRA. It needs ``IncreLoraCallback`` or ``attach``.
        remora_types: 2: types 1 and 2 in turn; 4: types 1, 2, 3, 4. ``mora_type`` is the first.
        remora_warmup: Steps after each merge in which the learning rate rises anew, linearly.
        init_lora_weights: True: M 0. False: M random, so that a fresh adapter is not the identity (for
            tests).
        module_sizes: Kept by the library, for what reads a saved adapter: out and in, by full module name.
        merges: Kept by the library: how often M was merged.

    The other arguments are LoraConfig's: ``target_modules``, ``lora_dropout``, ``bias``, ``use_rslora``,
    ``modules_to_save``, ``trainable_token_indices``, ``exclude_modules``, ``layers_to_transform``,
    ``layers_pattern``, ``rank_pattern``, ``alpha_pattern``, ``fan_in_fan_out`` (set by itself where it is
    needed), ``task_type``, ``inference_mode``. Linear layers can be adapted.

    Raises:
        ValueError: an argument has a wrong value, or is an option of LoraConfig that is not supported; the
            message names it.
        TypeError: an argument has a wrong type.
    """

    lora_alpha: float | None = field(
        default=None, metadata={"help": "None: the scale is 1. A number: it is lora_alpha / r."}
    )
    mora_type: int = field(default=1, metadata={"help": "1, 2, 3, 4, or 6 (rotation)."})
    fold_inputs: bool = field(
        default=True, metadata={"help": "Type 6: do all inputs count? False: as published."}
    )
    remora_interval: int | None = field(
        default=None, metadata={"help": "ReMoRA: optimizer steps between merges; None: MoRA."}
    )
    remora_types: int = field(default=2, metadata={"help": "ReMoRA: how many types take turns, 2 or 4."})
    remora_warmup: int = field(default=50, metadata={"help": "ReMoRA: steps of warm-up after a merge."})
    init_lora_weights: bool = field(
        default=True, metadata={"help": "True: M starts at 0. False: at random.", "lora_variants": ()}
    )
    module_sizes: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "Kept by the library: out and in of the modules."}
    )
    merges: int = field(default=0, metadata={"help": "Kept by the library: how often M was merged."})

    def check(self) -> None:
        """Checks the type, the merges and the sizes."""
        if self.mora_type not in _TYPES or isinstance(self.mora_type, (bool, float)):
            raise ValueError(
                f"mora_type={self.mora_type!r} is no type of MoRA; it must be one of {list(_TYPES)}: 1 for a "
                "large r, 6 for a small one."
            )
        arguments.choice("fold_inputs", self.fold_inputs, (True, False))
        arguments.integer("remora_interval", self.remora_interval, at_least=1, optional=True)
        arguments.choice("remora_types", self.remora_types, (2, 4))
        arguments.integer("remora_warmup", self.remora_warmup, at_least=0)
        arguments.integer("merges", self.merges, at_least=0)
        if self.remora_interval is not None and self.mora_type > self.remora_types:
            raise ValueError(
                f"mora_type={self.mora_type} is none of those that take turns under remora_types="
                f"{self.remora_types}; give one of {list(range(1, self.remora_types + 1))}"
                + (", or remora_types=4." if self.mora_type <= 4 else ", or leave remora_interval out.")
            )
        if not isinstance(self.module_sizes, dict):
            raise TypeError(f"module_sizes={self.module_sizes!r} must be a dictionary; leave it out.")
        for name, sizes in self.module_sizes.items():
            if not isinstance(sizes, (list, tuple)) or [type(size) for size in sizes] != [int, int]:
                raise ValueError(
                    f"module_sizes[{name!r}]={sizes!r} must be two numbers, out and in; leave it out: the "
                    "library keeps it."
                )

    def check_alpha(self) -> None:
        """Checks ``lora_alpha``, which may be None."""
        if self.lora_alpha is not None:
            super().check_alpha()

    def check_rank(self, site: Site, rank: int) -> None:
        """Refuses a module that is not the one of a saved adapter, or too small for type 6.

        Raises:
            SizeMismatchError: the adapter was saved from a module of another size.
            ValueError: type 6 would have a matrix of one number.
        """
        size = [site.out, site.features]
        known = list(self.module_sizes.get(site.name, size))
        if known != size:
            # The square may fit all the same.
            raise SizeMismatchError(
                f"size mismatch: the module {site.name!r} is {size[0]} by {size[1]}, and module_sizes has "
                f"{known[0]} by {known[1]}; the adapter was saved from another base model. For a fresh one, "
                "leave module_sizes out."
            )
        if self._side(site, rank) < 1:
            raise ValueError(
                f"r={rank} gives a matrix of one number for its {site.features} inputs and {site.out} "
                "outputs, and mora_type=6 turns pairs; give a higher r, mora_type=1, or leave the module out "
                "of target_modules."
            )

    def rank_for(self, site: Site, rank: int) -> int:
        """q, the side of M.

        Raises:
            ValueError: as for :meth:`check_rank`.
        """
        self.check_rank(site, rank)
        return self._side(site, rank)

    def _side(self, site: Site, rank: int) -> int:
        side = math.floor(math.sqrt((site.features + site.out) * rank) + 0.5)
        return side - side % 2 if self.mora_type == ROTATION else side

    def alpha_of(self, module: str) -> float:
        """As LoRA's; without a ``lora_alpha`` the one of scale 1."""
        alpha: float | None = super().alpha_of(module)
        return self.divisor(self.r) if alpha is None else alpha

    def divisor(self, rank: int) -> float:
        """r, or its root, whatever the side of M."""
        return super().divisor(self.r)

    @property
    def policy(self) -> Any:
        """ReMoRA's, where M is merged at intervals."""
        return None if self.remora_interval is None else Remora

    @property
    def exports(self) -> bool:
        """Of type 6 there is no LoRA."""
        return self.mora_type != ROTATION

    @property
    def type_now(self) -> int:
        """The type of M now."""
        if self.remora_interval is None:
            return self.mora_type
        return (self.mora_type - 1 + self.merges) % self.remora_types + 1

    @property
    def merged_types(self) -> list[int]:
        """The types of which something was merged."""
        first, count = self.mora_type - 1, min(self.merges, self.remora_types)
        return [(first + merge) % self.remora_types + 1 for merge in range(count)]

    def note(self, sites: Iterable[Site], *, unlike_lora: Iterable[str], experts: Iterable[str]) -> None:
        """Takes down the sizes, too, which M does not tell."""
        sites = list(sites)
        super().note(sites, unlike_lora=unlike_lora, experts=experts)
        self.module_sizes = {site.name: [site.out, site.features] for site in sites}

    def note_loaded(self, kept: Mapping[str, Tensor]) -> None:
        """The number of merges says which type M is of."""
        if self.remora_interval is not None and not kept[_MERGES].is_meta:
            self.merges = _count(kept[_MERGES])


class SquareMatrix(Structure):
    """M (q, q); under ReMoRA also what was merged, a matrix a type, and how often."""

    names: ClassVar[tuple[str, ...]] = ("lora_A",)
    kept_names: ClassVar[tuple[str, ...]] = (_MERGED, _MERGES)

    def shapes(self, site: Site, rank: int, config: MoraConfig) -> dict[str, tuple[int, ...]]:
        """``rank`` is q."""
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (rank, rank)}
        if self.keeps(config):
            shapes |= {_MERGED: (config.remora_types, rank, rank), _MERGES: (1, _DIGITS)}
        return shapes

    def draw(
        self, site: Site, rank: int, config: MoraConfig, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """0: there is no second factor that would have to be, and the gradient of M is not."""
        device = None if generator is None else generator.device
        m = torch.zeros(rank, rank, device=device)
        if config.init_lora_weights is False:
            bound = 1.0 / math.sqrt(rank)
            m.uniform_(-bound, bound, generator=generator)
        return {"lora_A": m}

    def keeps(self, config: MoraConfig) -> bool:
        """Under ReMoRA."""
        return config.remora_interval is not None

    def kept(self, site: Site, rank: int, config: MoraConfig) -> dict[str, Tensor]:
        """Nothing was merged yet."""
        if not self.keeps(config):
            return {}
        shapes = self.shapes(site, rank, config)
        return {name: torch.zeros(shapes[name]) for name in self.kept_names}

    def update(
        self,
        parameters: Mapping[str, Tensor],
        site: Site,
        config: MoraConfig,
        scale: Any,
        *,
        training: bool,
    ) -> Update:
        """M in its type, and what was merged, in its own."""
        m, now = parameters["lora_A"], config.type_now
        # While M is trained behind a dropout, what was merged of its type is not.
        joined = not (training and config.lora_dropout > 0.0)
        rest = []
        for form in config.merged_types:
            merged = parameters[_MERGED][form - 1].detach()
            if form == now and joined:
                m = m + merged
            else:
                rest.append(self._square(merged, form, site, config, scale))
        trained = self._square(m, now, site, config, scale)
        return Total(trained, rest) if rest else trained

    def _square(self, m: Tensor, form: int, site: Site, config: MoraConfig, scale: Any) -> Update:
        return Square(m, form, site.out, site.features, scale, config.fold_inputs)

    def rank_of(self, parameters: Mapping[str, Tensor]) -> int:
        """Rows of M."""
        return parameters["lora_A"].shape[0]

    def sizes(self, parameters: Mapping[str, Tensor], config: MoraConfig, name: str) -> tuple[int, int]:
        """Those that the configuration kept.

        Raises:
            ValueError: it has none of this module.
        """
        if name not in config.module_sizes:
            raise ValueError(
                f"model_or_adapter_dir: the configuration has no module_sizes of module {name!r}, without "
                "which the size of its update is not known; load the adapter into its base model, and save "
                "it."
            )
        out, features = config.module_sizes[name]
        return out, features


class Remora(Policy):
    """ReMoRA: every ``remora_interval`` steps M is added to what was merged, which is not trained, and begins
    anew at 0 in the next type, without optimizer state and with a warm-up of the learning rate.

    The base weight stays as it is: what was merged of one type adds up to one matrix, so an adapter holds all
    of it exactly, is saved by itself and can be taken off. At the last step of a training, nothing is merged.

    Args:
        modules, config, plan: As for :class:`Policy`.
    """

    # M of one type and M of the next have no mean.
    averages = False

    def __init__(self, modules: Sequence[AdaptedModule], config: MoraConfig, plan: Plan) -> None:
        super().__init__(modules, config, plan)
        self._matrices: list[Tensor] = [module.factors[0] for module in modules]
        self._before: list[Tensor] = []
        # Of a resumed training: as often as the adapter must have been merged.
        self._expected: int | None = None
        # Norms of what the last merge took in.
        self._norms = np.zeros(len(modules))

    @property
    def _interval(self) -> int:
        interval: int = self.config.remora_interval
        return interval

    def _warmth(self, number: int) -> float:
        """By how much the learning rate of step ``number`` counts."""
        since = (number - 1) % self._interval + 1
        if number <= self._interval or since >= self.config.remora_warmup:
            return 1.0
        return since / float(self.config.remora_warmup)

    def before_step(self, step: Step) -> None:
        """Keeps M as it is, where the step will be shortened.

        Raises:
            ValueError: the resumed optimizer and the adapter are not of one checkpoint.
        """
        if self._expected is not None and self._expected != self.config.merges:
            raise ValueError(
                f"model: its adapter was merged {self.config.merges} times, but the resumed optimizer state "
                f"is of {self._expected} merges; load the adapter of the same checkpoint into the model "
                "before the optimizer's state."
            )
        self._expected = None
        self._before = []
        if self._warmth(step.number) < 1.0:
            self._before = list(torch._foreach_mul(self._matrices, 1.0))

    def after_step(self, step: Step) -> Event | None:
        """Shortens the step; merges, where it is time."""
        if self._before:
            torch._foreach_lerp_(self._matrices, self._before, 1.0 - self._warmth(step.number))
            self._before = []
        if step.number % self._interval or step.number == self.plan.total_steps:
            return None
        config, form = self.config, self.config.type_now
        norms = torch.stack(torch._foreach_norm(self._matrices)).double()
        self._norms = norms.cpu().numpy()
        torch._foreach_add_([merged[form - 1] for merged in self._kept(_MERGED)], self._matrices)
        torch._foreach_zero_(self._matrices)
        config.merges += 1
        merges = self._kept(_MERGES)
        torch._foreach_copy_(merges, [_digits(config.merges)] * len(merges))
        count = len(self.modules)
        line = f"merge {config.merges}: M of type {form} in {count} modules, now type {config.type_now}"
        return Event(
            changed=range(count),
            scores=self._norms,
            line=line,
            resized=False,
            restarted=tuple(factor for module in self.modules for factor in module.factors),
        )

    def _kept(self, name: str) -> list[Tensor]:
        return [module.layer.tensors(module.adapter)[name] for module in self.modules]

    def scores(self) -> Any:
        """The norm of M of every module as of the last merge."""
        return self._norms

    def logs(self) -> dict[str, float]:
        """The type of M, and the number of merges."""
        return {"mora_type": float(self.config.type_now), "merges": float(self.config.merges)}

    def state_dict(self) -> dict[str, Any]:
        """The number of merges, and their norms."""
        return {"merges": self.config.merges, "norms": self._norms.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them in; the adapter brings what was merged."""
        self._expected = int(state["merges"])
        self._norms = np.array(state["norms"], dtype=np.float64)


def _digits(count: int) -> Tensor:
    digits = [count // _BASE**place % _BASE for place in range(_DIGITS)]
    return torch.tensor([digits], dtype=torch.float32, device="cpu")


def _count(digits: Tensor) -> int:
    return sum(int(digit) * _BASE**place for place, digit in enumerate(digits.flatten().tolist()))


METHOD = Method(
    name="mora",
    title="MoRA",
    config=MoraConfig,
    structure=SquareMatrix(),
    summary="A square matrix between a fixed compression of a module's input and a fixed decompression",
    paper="https://arxiv.org/abs/2405.12130",
)
