"""``IncreLoraConfig``: LoraConfig with a budget of ranks, every argument checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...contract.config import WITH_DORA, MethodConfig
from ...support import arguments
from ...support.budget import Budget
from ...support.names import rank_pattern
from ...support.sites import Site
from ...support.warning import warn


@dataclass
class IncreLoraConfig(MethodConfig):
    """Configuration of IncreLoRA (arXiv 2308.12043), in place of ``peft.LoraConfig``.

    Args:
        r: The budget: the average rank of the adapted modules at the end of training, an integer of 1 or
            more or a fraction: 0.25 is one component for four modules; see ``budget_unit``. What a fraction
            makes is rounded, and never less than one component. Below 1 ranks that grow begin at 0.
        init_r: Rank of every module at the start, 1 or more, above ``r`` too; None: ``r``, its floor, at
            least 1, at most min(in, out). Of ranks that grow from 0 to ``r``; None: 1, or 0 where ``r`` is
            below 1. ``rank_pattern`` sets it by module. A module of rank 0 is its base layer alone;
            ``importance="gradient"`` tells what it would gain, so that with 0 a module has nothing until it
            is chosen. As long as no module has anything, the gradient is measured in every step, for a loss
            has no other; steps outside of the window do not count.
        max_r: Rank past which no module grows, at least ``r``; None: only min(in, out) of the module.
        total_step: Optimizer steps of the training; None: from the Trainer, or given to ``attach``.
        tinit: The first step at which ranks may move; None: 10 % of the steps. Where they grow, steps before
            the first growth; None: 10 % of the steps, at most half of ``growth_end``.
        deltaT: Steps between events; None: spread evenly until ``growth_end``.
        growth_end: Share of the steps until which ranks may move, above 0 and at most 1; None: 0.75. Where
            they grow, by which the budget is reached; None: 0.1. From a ``tinit`` at or
            after it on, growth takes as many steps as it would have taken. Where no multiple of a given
            ``deltaT`` lies before it, or a given ``top_h`` is too low for it, growth goes on after it, and a
            warning says until when; where both are given, they alone decide.
        top_h: Modules that grow at one event; None: what the budget needs.
        add_r: Components that each of them gains; more where ``top_h`` is left open and all modules together
            would not reach the budget.
        beta1: Decay of the smoothed importance, in [0, 1) (eq. 7 of the paper); see ``importance``.
        beta2: Decay of its uncertainty, in [0, 1) (eq. 8), likewise.
        orth_reg_weight: Weight of the orthogonality regulariser (eq. 4); None: 0.1 with
            ``init_lora_weights="svd"``, else 0, for LoRA's init is not orthonormal.
        init_lora_weights: True: LoRA's own (A Kaiming uniform, B 0, E 1; for embeddings A 0, B ~ N(0, 1)).
            "gaussian": the same with A ~ N(0, 1 / r^2), N(0, 1) where r is below 1. "svd": the paper's
            (A, B ~ N(0, 0.02^2), E 0). False: like True but both random, so that a fresh adapter is not the
            identity (for tests).
        scaling: "budget": alpha / r for every module at all times, so alpha and learning rate carry
            over from LoraConfig(r=r); alpha where ``r`` is below 1, for the modules chosen have a component,
            as with LoraConfig(r=1), however few they are. "rank": alpha / r_k with the module's own rank (the
            paper). ``use_rslora=True`` takes the square root of the rank in either.
        advance_learning: Keep components in reserve that learn before they count (section 3.3);
            None: where ``init_lora_weights="svd"``, the only init for which it is defined.
        restart_warmup: New components go through the learning rate's warm-up anew (section 3.3).
        preserve_output: With ``scaling="rank"``, rescale the old E at a growth so that the module's
            update does not shrink by it; False is the paper's behaviour. With "budget" no growth changes it.
        importance_window: Steps before each growth in which the importance is computed. "auto": as
            many as weigh 1e-3 or more in the smoothing; None: every step, as the paper does.
        importance: What ranks go by. "fluctuation": of each component, the mean square of ``E dL/dE`` about
            its running mean. Ranks then do not grow but move: from the budget's rank everywhere to where
            components do most (docs/method.md). ``top_h``, ``add_r``, ``beta1``, ``beta2``,
            ``importance_norm``, ``importance_window`` and ``advance_learning=True`` do not apply, and raise.
            With the others ranks grow, by a module's score. "gradient": what a new component would gain, the
            largest singular value of G outside the span of what the module has, G the gradient of its weight,
            from a small sketch of G that the backward passes since the last growth add up, those of the
            window at most. ``beta1`` and ``beta2`` then say nothing but how long the window "auto" is, and
            ``importance_norm`` must be left at "sqrt": the value of one component does not depend on the
            module's size. A new component starts from the leading singular vectors of what is left, as long
            as random numbers would be (B = 0 stays 0), unless one was kept in reserve.
            "sensitivity": ``sum |dW * G|`` of what the module has (eq. 6 of the paper), 0 for one of rank 0.
        importance_norm: Divide a module's importance by "sqrt": sqrt(out in), as the authors' code
            does, or "mean": out in, as the paper prints.
        budget_unit: What the budget counts. "rank": components, ``r`` times the number of modules in all.
            "parameters": the numbers that components train, in + out + 1 each, ``r`` times their sum over the
            modules in all: what rank ``r`` everywhere would train. Modules are then chosen by their score for
            each parameter, and growth ends when no component fits any more. None: "parameters", for ranks
            that grow "rank".
        growth: How parameters change their rank. "resize": in place, so that they are never larger than what
            they hold. "capacity": they have the largest size that they may come to from the start, and the
            rank says how many rows count; the others are 0, get no gradient, and are not saved. Choices
            and results are the same. It is for what cannot bear a change of size, FSDP1 above all
            (docs/distributed.md), and takes memory, with optimizer state, for min(``max_r``, in, out, budget)
            components a module: set ``max_r``. None: "resize", and "capacity" where Trainer uses FSDP1.

    The other arguments are LoraConfig's: ``target_modules``, ``target_parameters`` (of fused experts, each of
    which has a rank of its own, and of routers; docs/models.md), ``lora_alpha``, ``lora_dropout``,
    ``bias``, ``use_rslora``, ``modules_to_save``, ``trainable_token_indices``, ``exclude_modules``,
    ``layers_to_transform``, ``layers_pattern``, ``rank_pattern`` (initial ranks; kept up to date as
    ranks grow), ``alpha_pattern``, ``use_dora`` (docs/dora.md), ``fan_in_fan_out`` (set by itself where it is
    needed), ``task_type``, ``inference_mode``.

    Raises:
        ValueError: an argument has a wrong value, or is an option of LoraConfig that is not
            supported; the message names it.
        TypeError: an argument has a wrong type.
    """

    supported: ClassVar[frozenset[str]] = WITH_DORA | {"target_parameters"}
    inits: ClassVar[tuple[Any, ...]] = (True, False, "gaussian", "svd")

    r: int | float = field(default=8, metadata={"help": "Average rank at the end, an integer or a fraction."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Initial rank by module; kept up to date as ranks grow."}
    )
    init_r: int | None = field(default=None, metadata={"help": "Rank of every module at the start."})
    max_r: int | None = field(default=None, metadata={"help": "Rank past which no module grows."})
    total_step: int | None = field(default=None, metadata={"help": "Optimizer steps in all."})
    tinit: int | None = field(default=None, metadata={"help": "Steps before the first growth."})
    deltaT: int | None = field(default=None, metadata={"help": "Steps between growth events."})
    growth_end: float | None = field(
        default=None, metadata={"help": "Share of the steps until the last change of a rank."}
    )
    top_h: int | None = field(default=None, metadata={"help": "Modules that grow at an event."})
    add_r: int = field(default=1, metadata={"help": "Components each of them gains at least."})
    beta1: float = field(default=0.85, metadata={"help": "Decay of the smoothed importance."})
    beta2: float = field(default=0.85, metadata={"help": "Decay of its uncertainty."})
    orth_reg_weight: float | None = field(
        default=None, metadata={"help": "Weight of the orthogonality regulariser."}
    )
    init_lora_weights: bool | Literal["gaussian", "svd"] = field(
        default=True,
        metadata={"help": "True or 'gaussian' (LoRA's), 'svd' (the paper's) or False.", "lora_variants": ()},
    )
    scaling: Literal["budget", "rank"] = field(
        default="budget", metadata={"help": "alpha / r ('budget') or alpha / r_k ('rank')."}
    )
    advance_learning: bool | None = field(
        default=None, metadata={"help": "Components in reserve learn before they count."}
    )
    restart_warmup: bool = field(
        default=True, metadata={"help": "New components warm their learning rate up anew."}
    )
    preserve_output: bool = field(
        default=True, metadata={"help": "Growth leaves the update of a module as it is."}
    )
    importance_window: Literal["auto"] | int | None = field(
        default="auto", metadata={"help": "Steps before a growth that compute the importance."}
    )
    importance_norm: Literal["sqrt", "mean"] = field(
        default="sqrt", metadata={"help": "Divide the importance by sqrt(out in) or out in."}
    )
    importance: Literal["fluctuation", "sensitivity", "gradient"] = field(
        default="fluctuation",
        metadata={"help": "What ranks go by: how what a component does fluctuates, sum |dW * G|, or G."},
    )
    budget_unit: Literal["rank", "parameters"] | None = field(
        default=None, metadata={"help": "What the budget counts: components, or their parameters."}
    )
    growth: Literal["resize", "capacity"] | None = field(
        default=None,
        metadata={
            "help": "Do parameters change their size, or have room from the start?",
            "changes_result": False,
        },
    )

    @classmethod
    def paper(cls, **kwargs: Any) -> IncreLoraConfig:
        """The method as published: the paper's value of everything that ``kwargs`` does not set.

        The schedule stays automatic: the paper sets tinit = deltaT to 100, 500 or 1000 steps and
        top_h to 2 to 12 by task.
        """
        values: dict[str, Any] = {
            "r": 2,
            "init_r": 1,
            "lora_alpha": 16,
            "init_lora_weights": "svd",
            "scaling": "rank",
            "advance_learning": True,
            "restart_warmup": True,
            "preserve_output": False,
            "orth_reg_weight": 0.1,
            "growth_end": 0.6,
            "beta1": 0.85,
            "beta2": 0.85,
            "importance": "sensitivity",
            "importance_window": None,
            "importance_norm": "sqrt",
            "budget_unit": "rank",
        }
        return cls(**(values | kwargs))

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """As PEFT's. A saved ``init_new``, once an option, is dropped where it follows from the others, else
        told."""
        begun = kwargs.pop("init_new", None)
        config = super().from_peft_type(**kwargs)
        if begun == "random" and isinstance(config, cls) and config.follows_gradient:
            warn(
                "init_new='random' of the saved configuration is no option any more: by "
                "importance='gradient' new components start along the gradient. What was trained stays."
            )
        return config

    @property
    def first_rank(self) -> int:
        """``init_r``, None resolved."""
        if self.init_r is not None:
            return self.init_r
        if self.importance == "fluctuation":
            return max(1, math.floor(self.r))
        return 1 if self.r >= 1 else 0

    @property
    def last_growth(self) -> float:
        """``growth_end``, None resolved."""
        if self.growth_end is not None:
            return self.growth_end
        return 0.75 if self.importance == "fluctuation" else 0.1

    @property
    def unit(self) -> Literal["rank", "parameters"]:
        """``budget_unit``, None resolved."""
        if self.budget_unit is not None:
            return self.budget_unit
        return "parameters" if self.importance == "fluctuation" else "rank"

    @classmethod
    def options_beside_r(cls) -> Sequence[dict[str, Any]]:
        """A budget of parameters: the size of one of ranks is that of the modules that they go to."""
        return [{"budget_unit": "parameters"}]

    @property
    def ends_at_r(self) -> bool:
        """It is a budget."""
        return True

    def resolved(self) -> dict[str, Any]:
        """The first rank, the last growth and the budget's unit, None resolved."""
        return {"init_r": self.first_rank, "growth_end": self.last_growth, "budget_unit": self.unit}

    @property
    def uses_reserve(self) -> bool:
        """Are components kept in reserve (``advance_learning``, None resolved)?"""
        if self.advance_learning is None:
            return self.init_lora_weights == "svd" and self.importance != "fluctuation"
        return self.advance_learning

    @property
    def follows_gradient(self) -> bool:
        """Do new components start from the gradient's directions? One in reserve was drawn long before."""
        return self.importance == "gradient" and not self.uses_reserve

    @property
    def orthogonality_weight(self) -> float:
        """``orth_reg_weight``, None resolved."""
        if self.orth_reg_weight is None:
            return 0.1 if self.init_lora_weights == "svd" else 0.0
        return self.orth_reg_weight

    def check_rank(self, site: Site, rank: int) -> None:
        """No module grows past min(in, out), so none begins there."""
        if rank > site.largest_rank:
            raise ValueError(
                f"rank {rank} is more than {site.largest_rank}, the smaller of in_features={site.features} "
                f"and out_features={site.out}; lower init_r or rank_pattern, or leave this module out of "
                "target_modules."
            )

    def rank_for(self, site: Site, rank: int) -> int:
        """At most min(in, out), where the rank is nobody's wish but the budget's."""
        own = self.init_r is None and rank == self.first_rank and self.importance == "fluctuation"
        return super().rank_for(site, min(rank, site.largest_rank) if own else rank)

    def divisor(self, rank: int) -> float:
        """What alpha is divided by for a module of ``rank`` active components: 1 or more, for a budget of
        less than a component a module would scale each of the few up by so much."""
        divisor = float(max(self.r if self.scaling == "budget" else rank, 1))
        return divisor**0.5 if self.use_rslora else divisor

    @property
    def scale_follows_rank(self) -> bool:
        """With ``scaling="rank"``, which divides alpha by the module's own rank."""
        return self.scaling == "rank"

    def note_ranks(self, ranks: Mapping[str, int]) -> None:
        """Keeps ``rank_pattern`` up to date."""
        self.rank_pattern = rank_pattern(dict(ranks))

    def budget(self, sizes: Sequence[tuple[int, int]], ranks: Iterable[int]) -> Budget:
        """What rank ``r`` everywhere takes, in the unit of ``budget_unit``."""
        return Budget.of(self.r, self.unit, sizes)

    def describe_ranks(self, sizes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> str:
        """The total beside the budget."""
        budget = self.budget(sizes, ranks)
        of_what = "" if budget.unit == "rank" else "those of "
        return f"total {budget.told(ranks)} ({of_what}`r={self.r}` on average)"

    def of_sum(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Every module at scale 1, the budget their average rank."""
        r = max(math.ceil(sum(ranks.values()) / len(ranks)), 1)
        return {
            "r": r,
            "lora_alpha": r,
            "init_r": 1,
            "max_r": None,
            "budget_unit": "rank",
            "scaling": "budget",
            "preserve_output": True,
            "growth": None,
        }

    @property
    def makes_room(self) -> bool:
        """``growth="capacity"``; an adapter that is not trained has no use for it."""
        return self.growth == "capacity" and not self.inference_mode

    def room(self, sizes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> list[int]:
        """min(``max_r``, in, out), and with nothing in reserve what the budget pays for."""
        self._check_room()
        budget = self.budget(sizes, ranks)
        # Ranks that move may begin above the budget.
        total = max(budget.total, budget.spent(ranks))
        rooms = []
        for size, cost, rank in zip(sizes, budget.costs, ranks, strict=True):
            most = min(*size, self.max_r or min(size))
            rooms.append(max(most if self.uses_reserve else min(most, total // cost), rank))
        return rooms

    def check(self) -> None:
        """Checks ranks, schedule and choices."""
        self._check_ranks()
        self._check_schedule()
        self._check_choices()
        self._check_parameters()

    def _check_parameters(self) -> None:
        """What there is for a layer that is called, and not for a parameter, is refused."""
        if not self.target_parameters:
            return
        named = f"target_parameters={sorted(self.target_parameters)!r}"
        for name, default in {"lora_dropout": 0.0, "use_dora": False, "fan_in_fan_out": False}.items():
            value = getattr(self, name)
            if value != default:
                raise ValueError(
                    f"{name}={value!r} does not apply to {named}: an update is added to a parameter, not to "
                    f"what a layer gives; leave it at {default!r}."
                )
        if self.growth == "capacity":
            self._check_room()

    def _check_room(self) -> None:
        if self.target_parameters:
            raise ValueError(
                "growth='capacity' is not supported with target_parameters="
                f"{sorted(self.target_parameters)!r}, nor are FSDP1 and ZeRO, which need it; leave growth "
                "out, and use DDP."
            )

    def check_r(self) -> None:
        """An integer, or a fraction."""
        if isinstance(self.r, float) and not self.r.is_integer():
            arguments.number("r", self.r, above=0.0)
        else:
            super().check_r()

    def _check_ranks(self) -> None:
        arguments.integer("init_r", self.init_r, at_least=0, optional=True)
        arguments.integer("max_r", self.max_r, at_least=1, optional=True)
        arguments.integer("add_r", self.add_r, at_least=1)
        arguments.choice("importance", self.importance, ("fluctuation", "sensitivity", "gradient"))
        moves = self.importance == "fluctuation"
        if self.first_rank > self.r and not moves:
            raise ValueError(
                f"r={self.r} is below init_r={self.first_rank}; r is the budget, the average rank at the "
                "end of training: give at least init_r, or a lower init_r: with 0 a module has nothing until "
                "it is chosen."
            )
        if self.first_rank == 0 and self.importance in ("sensitivity", "fluctuation"):
            raise ValueError(
                f"init_r=0 and importance={self.importance!r}: what a module without components does cannot "
                "be told, so none would be chosen by it; give init_r=1 or more, or set importance='gradient'."
            )
        if self.max_r is not None and self.max_r < self.r:
            raise ValueError(
                f"max_r={self.max_r} is below r={self.r}, so the budget can never be reached; give at "
                "least r."
            )

    def _check_schedule(self) -> None:
        arguments.integer("total_step", self.total_step, at_least=1, optional=True)
        arguments.integer("tinit", self.tinit, at_least=0, optional=True)
        arguments.integer("deltaT", self.deltaT, at_least=1, optional=True)
        arguments.integer("top_h", self.top_h, at_least=1, optional=True)
        if self.growth_end is not None:
            arguments.number("growth_end", self.growth_end, above=0.0, at_most=1.0)
        if self.total_step is not None and (self.tinit or 0) >= self.total_step:
            raise ValueError(
                f"tinit={self.tinit} leaves no step for growth out of total_step={self.total_step}; "
                "give less."
            )
        arguments.number("beta1", self.beta1, at_least=0.0, below=1.0)
        arguments.number("beta2", self.beta2, at_least=0.0, below=1.0)
        if self.orth_reg_weight is not None:
            arguments.number("orth_reg_weight", self.orth_reg_weight, at_least=0.0)
        if self.importance_window != "auto":
            arguments.integer("importance_window", self.importance_window, at_least=1, optional=True)

    def _check_choices(self) -> None:
        arguments.choice("scaling", self.scaling, ("budget", "rank"))
        arguments.choice("importance_norm", self.importance_norm, ("sqrt", "mean"))
        arguments.choice("budget_unit", self.budget_unit, ("rank", "parameters", None))
        arguments.choice("advance_learning", self.advance_learning, (True, False, None))
        arguments.choice("growth", self.growth, ("resize", "capacity", None))
        for name in ("restart_warmup", "preserve_output"):
            arguments.choice(name, getattr(self, name), (True, False))
        if self.advance_learning and self.init_lora_weights != "svd":
            raise ValueError(
                f"advance_learning=True needs init_lora_weights='svd', not "
                f"{self.init_lora_weights!r}: with LoRA's init a new component starts at B = 0 and "
                "there is nothing to keep in reserve."
            )
        if self.importance == "fluctuation":
            self._check_moves()
        if self.importance == "gradient" and self.importance_norm != "sqrt":
            raise ValueError(
                f"importance_norm={self.importance_norm!r} does not apply to importance='gradient', which is "
                "the value of one component whatever the module's size; leave it out, or set "
                "importance='sensitivity'."
            )
        if self.importance == "gradient" and self.importance_window != "auto":
            for name in ("beta1", "beta2"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} does not apply to importance='gradient', which is "
                        f"not smoothed, with importance_window={self.importance_window!r}; leave it out, or "
                        "set importance='sensitivity'."
                    )
        if self.scaling == "budget" and not self.preserve_output:
            raise ValueError(
                "preserve_output=False needs scaling='rank': with scaling='budget' no growth changes what "
                "the module does; set both, or leave preserve_output out."
            )

    def _check_moves(self) -> None:
        """What ranks that move have no use for is refused."""
        unused = {"top_h": None, "add_r": 1, "beta1": 0.85, "beta2": 0.85, "importance_norm": "sqrt"}
        unused |= {"importance_window": "auto", "advance_learning": None}
        for name, default in unused.items():
            value = getattr(self, name)
            if value != default and not (name == "advance_learning" and value is False):
                raise ValueError(
                    f"{name}={value!r} does not apply to importance='fluctuation', by which ranks move; "
                    "leave it out, or set importance='sensitivity' (the paper's) or 'gradient'."
                )
