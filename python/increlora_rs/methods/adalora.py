"""AdaLoRA (arXiv 2303.10512): triplets ``b_i e_i a_i^T``, of which the least important of all modules are
masked until as many are left as the budget pays for.

``dW = s B diag(E) A`` with ``s = lora_alpha / r0`` and r0 the module's rank at the start. A masked triplet
has E 0 and is trained on: the next mask event may take it in again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import _core
from ..contract.config import WITH_DORA, MethodConfig
from ..contract.method import Method
from ..contract.policy import AdaptedModule, Event, Plan, Policy, Step
from ..support import arguments
from ..support.budget import Budget
from ..support.warning import warn
from .components import FixedComponents
from .orthogonality import Orthogonality

_Vector = npt.NDArray[np.float64]


@dataclass
class AdaLoraRsConfig(MethodConfig):
    """Configuration of AdaLoRA (arXiv 2303.10512), in place of ``peft.LoraConfig`` or ``peft.AdaLoraConfig``.

    It needs ``IncreLoraCallback`` or ``attach``, which know the number of steps; nothing is called by hand.
    The equations are in docs/methods/adalora.md.

    Args:
        r: The budget: the average rank of the adapted modules at the end of training, PEFT's ``target_r``.
        init_r: Rank of every module at the start, at least ``r``; None: half as much again as ``r``, rounded
            up. ``rank_pattern`` sets it by module.
        tinit: Steps before the first mask event; None: 15 % of the steps, at most half of those before
            ``tfinal``.
        tfinal: Steps at the end in which what is masked stays so; None: half of those after ``tinit``. With 0
            the last step is a mask event all the same, so that the budget holds at the end.
        deltaT: Steps between mask events; None: as makes some 200 of them, at least 1.
        beta1: Decay of the smoothed sensitivity of each number, in [0, 1).
        beta2: Decay of its uncertainty, likewise.
        orth_reg_weight: Weight of the regulariser that keeps rows of A and columns of B orthonormal. Its
            gradient is added after clipping, and its value is in no loss.
        lora_alpha: The scale is ``lora_alpha / (r0 + 1e-5)`` at all times, r0 the module's rank at the start;
            with ``use_rslora=True`` over the root of r0.
        init_lora_weights: True: A, B ~ N(0, 0.02^2) and E 0. False: A and B uniform, E 1, so that a fresh
            adapter is not the identity (for tests).

    The other arguments are LoraConfig's: ``target_modules``, ``lora_dropout``, ``bias``, ``use_rslora``,
    ``modules_to_save``, ``trainable_token_indices``, ``exclude_modules``, ``layers_to_transform``,
    ``layers_pattern``, ``rank_pattern`` (ranks at the start), ``alpha_pattern``, ``use_dora``,
    ``fan_in_fan_out`` (set by itself where it is needed), ``task_type``, ``inference_mode``.

    Raises:
        ValueError: an argument has a wrong value, or is an option of LoraConfig that is not supported; the
            message names it.
        TypeError: an argument has a wrong type.
    """

    supported: ClassVar[frozenset[str]] = WITH_DORA

    r: int = field(default=8, metadata={"help": "Average rank at the end of training."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Rank by module at the start."}
    )
    lora_alpha: int = field(default=16, metadata={"help": "The scale is lora_alpha / init_r."})
    init_r: int | None = field(default=None, metadata={"help": "Rank of every module at the start."})
    tinit: int | None = field(default=None, metadata={"help": "Steps before the first mask event."})
    tfinal: int | None = field(default=None, metadata={"help": "Steps at the end with ranks that stay."})
    deltaT: int | None = field(default=None, metadata={"help": "Steps between mask events."})
    beta1: float = field(default=0.85, metadata={"help": "Decay of the smoothed sensitivity."})
    beta2: float = field(default=0.85, metadata={"help": "Decay of its uncertainty."})
    orth_reg_weight: float = field(default=0.1, metadata={"help": "Weight of the orthogonality regulariser."})
    init_lora_weights: bool = field(
        default=True, metadata={"help": "True: AdaLoRA's. False: random.", "lora_variants": ()}
    )

    @property
    def first_rank(self) -> int:
        """``init_r``, None resolved."""
        return (3 * self.r + 1) // 2 if self.init_r is None else self.init_r

    @property
    def ends_at_r(self) -> bool:
        """It is a budget."""
        return True

    def resolved(self) -> dict[str, Any]:
        """The rank at the start."""
        return {"init_r": self.first_rank}

    def check(self) -> None:
        """Checks ranks, schedule and weights."""
        arguments.integer("init_r", self.init_r, at_least=1, optional=True)
        if self.r > self.first_rank:
            raise ValueError(
                f"r={self.r} is above init_r={self.init_r}, and ranks only fall: r is their average at the "
                "end of training; lower r, or raise init_r."
            )
        arguments.integer("tinit", self.tinit, at_least=0, optional=True)
        arguments.integer("tfinal", self.tfinal, at_least=0, optional=True)
        arguments.integer("deltaT", self.deltaT, at_least=1, optional=True)
        arguments.number("beta1", self.beta1, at_least=0.0, below=1.0)
        arguments.number("beta2", self.beta2, at_least=0.0, below=1.0)
        arguments.number("orth_reg_weight", self.orth_reg_weight, at_least=0.0)

    def divisor(self, rank: int) -> float:
        """What alpha is divided by: the authors' code adds 1e-5."""
        return super().divisor(rank) if self.use_rslora else rank + 1e-5

    def budget(self, sizes: Sequence[tuple[int, int]], ranks: Iterable[int]) -> Budget:
        """``r`` times the number of modules."""
        return Budget.of(self.r, "rank", sizes)

    def describe_ranks(self, sizes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> str:
        """The total beside the budget."""
        return f"total {self.budget(sizes, ranks).told(ranks)} (`r={self.r}` on average)"


class Triplets(FixedComponents):
    """Components of which E is 0 where they are masked; none comes or goes while they are trained."""

    masks: ClassVar[bool] = True

    def is_svd(self, config: AdaLoraRsConfig) -> bool:
        """Always but for tests."""
        return config.init_lora_weights is True

    def acting(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The triplets whose E is not 0."""
        a, b, e = (parameters[name] for name in self.names)
        live = torch.nonzero(e.flatten()).flatten()
        return {"lora_A": a[live], "lora_B": b[:, live], "lora_E": e[live]}


class Pruning(Policy):
    """The regulariser before, scores and masks after every update, of all triplets at once.

    Args:
        modules, config, plan: As for :class:`Policy`.

    Attributes:
        budget: Triplets that are live at the end.
        schedule: When triplets are masked, and how many stay live.

    Raises:
        ValueError: the ranks at the start are below the budget.
    """

    budget: int
    schedule: _core.TripletSchedule

    def __init__(self, modules: Sequence[AdaptedModule], config: AdaLoraRsConfig, plan: Plan) -> None:
        super().__init__(modules, config, plan)
        self.budget = config.r * len(modules)
        self._held = [module.rank for module in modules]
        if self.budget > sum(self._held):
            raise ValueError(
                f"r={config.r}: {len(modules)} modules of this rank on average would have {self.budget} "
                f"components, but begin with {sum(self._held)}, and ranks only fall; lower r, or raise the "
                f"ranks of rank_pattern={config.rank_pattern}."
            )
        self._e: list[Tensor] = [module.factors[-1] for module in modules]
        self._orthogonality = Orthogonality(modules, config.orth_reg_weight)
        # Until the last mask event.
        self._scores: Sensitivities | None = None
        self._chosen_by = np.zeros(sum(self._held))
        self._steps = 0
        self._keep(np.ones(sum(self._held), dtype=np.bool_))

    def start(self) -> None:
        """Makes the schedule.

        Raises:
            ValueError: the number of steps is not known, or none is left for the ranks to fall in.
        """
        steps = self.plan.total_steps
        if steps is None:
            raise ValueError(
                "total_steps=None: by which step the ranks have fallen to the budget follows from the number "
                "of optimizer steps; give attach(..., total_steps=...)."
            )
        wish = {name: getattr(self.config, name) for name in ("tinit", "tfinal", "deltaT")}
        self.schedule = _core.TripletSchedule(steps, sum(self._held), self.budget, **wish)
        if self.budget < sum(self._held):
            self._scores = Sensitivities(self.modules, self.config)

    def before_step(self, step: Step) -> None:
        """Adds the regulariser's gradient."""
        self._orthogonality.before_step(step)

    def after_step(self, step: Step) -> Event | None:
        """Takes the sensitivities in; masks, where the schedule says so."""
        self._steps = step.number
        # A fused optimizer under a loss scaler has divided the gradients by the scale, and left them so.
        if self._scores is not None and self.schedule.observes(step.number):
            self._scores.observe()
        if self.schedule.is_event(step.number):
            return self._prune(step.number)
        if self.schedule.holds(step.number):
            torch._foreach_mul_(self._e, self._masks)
        return None

    def _prune(self, number: int) -> Event | None:
        if self._scores is not None:
            self._chosen_by = self._scores.values()
        before, budget = self._ranks, self.schedule.budget(number)
        self._keep(_core.live_triplets(self._chosen_by, budget))
        torch._foreach_mul_(self._e, self._masks)
        if number >= self.schedule.last:
            self._scores = None
        changed = [k for k, (had, has) in enumerate(zip(before, self._ranks, strict=True)) if had != has]
        if not changed:
            return None
        line = f"the ranks of {len(changed)} modules changed, total rank {budget}, at the end {self.budget}"
        return Event(changed, self._by_module(self._chosen_by), line, resized=False)

    def _keep(self, live: npt.NDArray[np.bool_]) -> None:
        """Takes down which triplets are live."""
        self._live = torch.from_numpy(live)
        parts = self._live.split(self._held)
        self._ranks = [int(part.count_nonzero()) for part in parts]
        self._masks = [part.view(-1, 1).to(e) for part, e in zip(parts, self._e, strict=True)]

    def _by_module(self, scores: _Vector) -> _Vector:
        """The mean of every module."""
        starts = np.cumsum([0, *self._held[:-1]])
        means: _Vector = np.add.reduceat(scores, starts) / np.array(self._held)
        return means

    @property
    def orth_reg(self) -> float:
        """Value of the orthogonality regulariser now, without its weight."""
        return float(self._orthogonality.value())

    def ranks(self) -> list[int]:
        """The triplets of every module that the last mask event has left; all of them before the first. When
        the training is over, those that the adapter has."""
        return list(self._ranks)

    def scores(self) -> _Vector:
        """The mean score of every module's triplets; from the last mask event on, as of that."""
        return self._by_module(self._chosen_by if self._scores is None else self._scores.values())

    def logs(self) -> dict[str, float]:
        """The regulariser's value."""
        return {"orth_reg": self.orth_reg}

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Schedule, sensitivities, and which triplets are live."""
        schedule = self.schedule
        return {
            "total_steps": schedule.total_steps,
            "budget": [schedule.first, schedule.target],
            "tinit": schedule.tinit,
            "tfinal": schedule.tfinal,
            "deltaT": schedule.deltaT,
            "sensitivities": None if self._scores is None else self._scores.state(),
            "chosen_by": torch.from_numpy(self._chosen_by),
            "held": list(self._held),
            "live": self._live.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on by the saved schedule; tells where the configuration has another.

        Raises:
            ValueError: it is of other ranks, or of modules of other sizes.
        """
        for module, had, has in zip(self.modules, state["held"], self._held, strict=True):
            if had != has:
                raise ValueError(
                    f"optimizer: its scheduler's state is of {had} components of {module.name!r}, but the "
                    f"adapter begins with {has}; resume with the init_r and rank_pattern that were trained."
                )
        scores = None
        if state["sensitivities"] is not None:
            scores = Sensitivities(self.modules, self.config)
            scores.restore(state["sensitivities"])
        self._scores = scores
        first, self.budget = state["budget"]
        wish = {name: state[name] for name in ("tinit", "tfinal", "deltaT")}
        self.schedule = _core.TripletSchedule(state["total_steps"], first, self.budget, **wish)
        for name, had in {"r": self.budget // len(self.modules), **wish}.items():
            value = getattr(self.config, name)
            if value is not None and value != had:
                warn(
                    f"{name}={value}, but the run that is resumed was planned with {had}: its ranks go on "
                    "falling by that plan"
                )
        self._chosen_by = state["chosen_by"].numpy().copy()
        self._keep(state["live"].numpy().copy())

    def finish(self) -> None:
        """Drops the sensitivities; tells of an adapter that is above the budget."""
        if self._scores is not None:
            self._chosen_by, self._scores = self._scores.values(), None
        # Of a training that ended between events, or at whose end an earlier adapter was loaded.
        self._ranks = torch.stack([torch.count_nonzero(e) for e in self._e]).tolist()
        total, schedule = sum(self._ranks), self.schedule
        if self._steps and total > self.budget:
            why = f"the training ended with step {self._steps} of {schedule.total_steps}"
            if self._steps >= schedule.last:
                why = "an adapter of an earlier step was loaded (load_best_model_at_end)"
            warn(
                f"the adapter has a total rank of {total}, above the budget of {self.budget}, which holds "
                f"from step {schedule.last} on: {why}; take a later one, or raise tfinal"
            )


class Sensitivities:
    """``|p dL/dp|`` of every number p of all triplets, smoothed, and its uncertainty; Rust takes a step in.

    Args:
        modules: The adapted modules.
        config: The configuration, with the decays.
    """

    def __init__(self, modules: Sequence[AdaptedModule], config: AdaLoraRsConfig) -> None:
        a, b, e = (list(of_all) for of_all in zip(*(module.factors for module in modules), strict=True))
        leaves = [*a, *b, *e]
        wide = torch.float64 if any(p.dtype == torch.float64 for p in leaves) else torch.float32
        count = sum(p.numel() for p in leaves)
        self._mean, self._uncertainty = (torch.zeros(count, dtype=wide, device=a[0].device) for _ in range(2))
        self._core = _core.TripletScores(a, b, e, self._mean, self._uncertainty, config.beta1, config.beta2)

    def observe(self) -> None:
        """Takes the gradients of a step in, with the parameters as they are after it."""
        self._core.observe_()

    def values(self) -> _Vector:
        """The score of every triplet, module by module."""
        values: _Vector = self._core.values().cpu().numpy()
        return values

    def state(self) -> dict[str, Tensor]:
        """Copies for a checkpoint."""
        return {"mean": self._mean.clone(), "uncertainty": self._uncertainty.clone()}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Takes what :meth:`state` gave.

        Raises:
            ValueError: it is of modules of other sizes.
        """
        if saved["mean"].shape != self._mean.shape:
            raise ValueError(
                f"optimizer: its scheduler's state is of {len(saved['mean'])} trained numbers, but the "
                f"adapter has {len(self._mean)}; resume with the base model that was trained."
            )
        self._mean.copy_(saved["mean"])
        self._uncertainty.copy_(saved["uncertainty"])


METHOD = Method(
    name="adalora_rs",
    title="AdaLoRA",
    config=AdaLoraRsConfig,
    structure=Triplets(),
    policy=Pruning,
    summary="A LoRA whose least important components were masked during training",
    paper="https://arxiv.org/abs/2303.10512",
)
