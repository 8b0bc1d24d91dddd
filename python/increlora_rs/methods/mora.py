"""MoRA (arXiv 2405.12130): one square matrix between a fixed compression of the input and a fixed
decompression to the output; and ReMoRA, which merges it at intervals and goes on with another compression.

``dW = s D M C`` with M (q, q), ``q = floor(sqrt((in + out) r) + 1/2)``, types 1 to 4; type 6 turns blocks of
the input instead (:mod:`increlora_rs.ops.square` has all of them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..contract.method import Method
from ..contract.policy import AdaptedModule, Event, Plan, Policy, Step
from ..contract.structure import Structure
from ..ops.square import ROTATION, Square
from ..ops.total import Total
from ..ops.update import Update
from ..resizing.optimizer_starts import weights_of
from ..support import arguments
from ..support.sites import Site
from ..support.warning import warn
from .module_sizes import SizedConfig

_TYPES = (1, 2, 3, 4, ROTATION)
_MERGED, _MERGES = "lora_merged", "lora_merges"
# The number of merges, the last digit first: numbers below it are exact in bfloat16, to which a model may be
# cast, and a whole number would not be a parameter like others.
_BASE, _DIGITS = 128, 4


@dataclass
class MoraConfig(SizedConfig):
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
        remora_warmup: Steps after each merge in which the learning rate rises anew, linearly; at most
            ``remora_interval``.
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

    meaning: ClassVar[tuple[str, ...]] = ("mora_type", "fold_inputs")

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
    merges: int = field(default=0, metadata={"help": "Kept by the library: how often M was merged."})

    def check(self) -> None:
        """Checks the type, the merges and the sizes."""
        super().check()
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

        if self.remora_interval is not None and self.remora_warmup > self.remora_interval:
            raise ValueError(
                f"remora_warmup={self.remora_warmup} steps do not fit between two merges, remora_interval="
                f"{self.remora_interval} steps apart, so the learning rate would never be whole; give at "
                f"most {self.remora_interval}, or 0."
            )
        self.note_merges(self.merges)

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
        super().check_rank(site, rank)
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

    def note_merges(self, count: int) -> None:
        """Takes down how often M was merged: it is of type ``type_now``, and something was merged of
        ``merged_types``.

        A compiled graph looks neither at the count, by which it would be compiled anew at every merge, nor at
        those types one by one: from the first merge on it has all (``merged_in_graphs``), some of them 0.
        """
        self.merges, first = count, self.mora_type - 1
        turns = self.remora_types if self.remora_interval is not None else 0
        self.type_now = (first + count) % turns + 1 if turns else self.mora_type
        self.merged_types = tuple((first + merge) % turns + 1 for merge in range(min(count, turns)))
        self.merged_in_graphs = tuple(range(1, turns + 1)) if count else ()

    def note_loaded(self, kept: Mapping[str, Tensor]) -> None:
        """The number of merges says which type M is of."""
        if self.remora_interval is not None and not kept[_MERGES].is_meta:
            self.note_merges(_count(kept[_MERGES]))


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
        """Nothing was merged yet, which the type is counted from: that of a configuration that an adapter was
        trained with goes on."""
        if not self.keeps(config):
            return {}
        merged = torch.zeros(self.shapes(site, rank, config)[_MERGED])
        return {_MERGED: merged, _MERGES: _digits(config.merges).to(merged.device)}

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
        for form in config.merged_in_graphs if torch.compiler.is_compiling() else config.merged_types:
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
        return config.size_of(name)


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
        self._before: list[list[Tensor]] = []
        # Of a resumed training: as often as the adapter must have been merged.
        self._expected: int | None = None
        # Norms of what the last merge took in.
        self._norms = np.zeros(len(modules))

    @property
    def _interval(self) -> int:
        interval: int = self.config.remora_interval
        return interval

    def start(self) -> None:
        """Tells of a training that is too short."""
        total = self.plan.total_steps
        if total is not None and total <= self._interval:
            warn(
                f"remora_interval={self._interval}, but the training has {total} steps, so nothing is merged "
                "and it is MoRA's; give fewer steps between merges"
            )

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
            self._before = [[values.clone() for values in moved] for moved in self._moved()]

    def after_step(self, step: Step) -> Event | None:
        """Shortens the step; merges, where it is time."""
        if self._before:
            moved = self._moved()
            for values, before in zip(moved, self._before, strict=True):
                # What the optimizer began to keep in this step began as M was.
                before += before[:1] * (len(values) - len(before))
            weight = 1.0 - self._warmth(step.number)
            torch._foreach_lerp_([*chain(*moved)], [*chain(*self._before)], weight)
            self._before = []
        if step.number % self._interval or step.number == self.plan.total_steps:
            return None
        config, form = self.config, self.config.type_now
        # One by one, for modules may be on several devices.
        self._norms = np.array([float(norm) for norm in torch._foreach_norm(self._matrices)])
        torch._foreach_add_([merged[form - 1] for merged in self._kept(_MERGED)], self._matrices)
        torch._foreach_zero_(self._matrices)
        config.note_merges(config.merges + 1)
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

    def _moved(self) -> list[list[Tensor]]:
        """M of every module, and what its optimizer moves along with it."""
        return [[m, *weights_of(self.plan.optimizer, m)] for m in self._matrices]

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
