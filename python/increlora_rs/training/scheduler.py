"""Growing the ranks during training: hooks on the optimizer, so that every loop works."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..methods.increlora import unreached
from ..methods.increlora.gradient import GradientScores
from ..methods.increlora.restart import LrSchedule, RestartWarmup
from ..methods.increlora.schedule import (
    budget_of,
    caps_of,
    new_schedule,
    ranks_of,
    schedule_of,
    total_steps_of,
)
from ..methods.increlora.sensitivity import Scores
from ..ops.device import stream
from ..resizing.ddp import find_ddp, rebuild_buckets
from ..resizing.graph import mark_growing
from ..resizing.optimizer_starts import steps_taken
from ..resizing.optimizer_state import watch
from ..support.history import GrowthHistory
from ..support.names import rank_pattern
from ..support.seeded import generator
from ..support.untraced import untraced
from . import checkpoint as saved_state
from . import step_kinds
from .assigned import Assigned
from .bystanders import Bystanders
from .distributed import average_, shared_seed
from .events import Cause, GrowthEvent, SizeListeners
from .fit import ATTACHED, check_attachable, trainable_adapter, unwrapped_optimizer
from .modules import adapted_modules
from .nested_step import StepDepth

logger = logging.getLogger(__name__)

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


@untraced
def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int | None = None,
    lr_warmup_steps: int = 0,
    lr_schedule: LrSchedule = "auto",
    scaler: Any = None,
    adapter_name: str | None = None,
) -> RankScheduler:
    """Makes the ranks of ``model`` grow while ``optimizer`` trains it.

    Call it once, after the optimizer was made and before the first step; with ``Trainer`` use
    ``IncreLoraCallback`` instead. It puts hooks on the optimizer; the training loop stays as it is.

    Args:
        model: A model with one trainable IncreLoRA adapter, with or without DistributedDataParallel.
        optimizer: The torch optimizer that holds the adapter's parameters (an
            ``AcceleratedOptimizer`` is unwrapped).
        total_steps: Optimizer steps of the training; None: ``config.total_step``. Needed unless
            ``tinit``, ``deltaT`` and ``top_h`` are all set.
        lr_warmup_steps: Steps of the learning rate's linear warm-up; new components repeat it.
        lr_schedule: "linear": the learning rate decays linearly to 0 at ``total_steps``, and new
            components get a decay of their own (section 3.3 of the paper); "follow": new components
            warm up to whatever the schedule has and follow it; "auto": "linear" if that is what the
            learning rate has done so far.
        scaler: The ``GradScaler`` of a float16 training.
        adapter_name: Which adapter; None: the trainable one.

    Returns:
        The scheduler: ``ranks``, ``total_rank``, ``budget``, ``scores``, ``history``, ``detach()``.

    Raises:
        ValueError: the model has no trainable IncreLoRA adapter, or several; the optimizer does not
            hold its parameters, or is LBFGS; the number of steps is unknown, or ``lr_schedule`` is; a
            scheduler is attached to the adapter or the optimizer already; the adapter is merged, sharded
            over processes, or has another scale than its configuration; a resumed state is of other modules
            or of another release.
        TypeError: ``optimizer`` is none of torch, or ``scaler`` no GradScaler.
    """
    return RankScheduler(
        model,
        optimizer,
        total_steps=total_steps,
        lr_warmup_steps=lr_warmup_steps,
        lr_schedule=lr_schedule,
        scaler=scaler,
        adapter_name=adapter_name,
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or torch.compile."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _check_free(optimizer: torch.optim.Optimizer) -> None:
    for hook in optimizer._optimizer_step_pre_hooks.values():
        if isinstance(getattr(hook, "__self__", None), RankScheduler):
            raise ValueError(
                "optimizer: a scheduler is attached to it already, and its checkpoint has room for one; call "
                "that one's detach() first, or give each adapter an optimizer of its own."
            )


class _TakeSizes:
    """After a load: buckets of the sizes of before would leave the next gradients to each process alone.

    It keeps the scheduler as long as the model is there; copies and pickles of the model take none along.
    """

    def __init__(self, scheduler: RankScheduler | None = None) -> None:
        self._scheduler = scheduler

    def __call__(self, model: nn.Module, _: Any) -> None:
        if self._scheduler is not None and self._scheduler._probe.reloaded:
            self._scheduler._rebuild_buckets()

    def __reduce__(self) -> tuple[type[_TakeSizes], tuple[()]]:
        return _TakeSizes, ()


class RankScheduler:
    """Allocates ranks during training; made by :func:`attach`.

    Attributes:
        schedule: When and how much the ranks grow (``tinit``, ``deltaT``, ``top_h``, ``add_r``).
        budget: Total rank at the end: ``config.r`` times the number of modules. With
            ``budget_unit="parameters"`` the numbers that the components train, and the end is where no
            further one fits.
        step: Optimizer steps taken. A call of ``optimizer.step`` that moves nothing is none: without a
            gradient, skipped by a loss scaler, or the trial by which
            ``torch.distributed.checkpoint.state_dict`` makes a fresh optimizer's state.
        restored: Was the state of an earlier run found in the optimizer?
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int | None,
        lr_warmup_steps: int,
        lr_schedule: LrSchedule,
        scaler: Any,
        adapter_name: str | None,
    ) -> None:
        self._model = _unwrapped(model)
        self._optimizer = unwrapped_optimizer(optimizer)
        self._adapter = trainable_adapter(self._model, adapter_name)
        self._modules = adapted_modules(self._model, self._adapter)
        check_attachable(self._modules, self._optimizer)
        _check_free(self._optimizer)
        self._config = self._modules[0].layer.configs[self._adapter]
        self._total_steps = total_steps_of(self._config, total_steps)
        self._restart = RestartWarmup(
            self._optimizer,
            enabled=self._config.restart_warmup,
            total_steps=self._total_steps,
            lr_warmup=lr_warmup_steps,
            lr_schedule=lr_schedule,
        )
        self._budget = budget_of(self._config, self._modules)
        self.budget = self._budget.total
        self.step = 0
        self.restored = False
        # Was the call of the optimizer at hand a step that counts?
        self._counts = False
        self._watched: Any = None
        self._depth = StepDepth()
        self._may_grow = False
        self._history: list[tuple[int, int, int, float]] = []
        self._growth = self._new_growth(list(self.ranks.values()))
        self._expected: list[tuple[int, int]] | None = None
        self._seed = shared_seed(torch.initial_seed(), self._modules[0].a.device)
        scores = GradientScores if self._config.importance == "gradient" else Scores
        self._scores = scores(self._modules, self._config, scaler)
        self._plan = self._scores.plan(self._modules)
        saved = self._group.get(saved_state.KEY, saved_state.HELD)
        if saved == saved_state.HELD:
            self._start()
        else:
            self._restore(saved)
        self._group[saved_state.KEY] = saved_state.HELD
        self._probe = self._modules[0].layer.probes[self._adapter]
        self._probe.attach(self._scores.gauge)
        ATTACHED[self] = self._probe
        self._probe.reloaded = False
        for slot, module in enumerate(self._modules):
            module.layer.probes[self._adapter] = self._probe
            module.layer.slots[self._adapter] = slot
            for parameter, dim, _ in module.parameters:
                mark_growing(parameter, dim)
                watch(parameter)
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
            self._optimizer.register_state_dict_post_hook(self._save),
            self._optimizer.register_load_state_dict_post_hook(self._after_load),
            self._model.register_load_state_dict_post_hook(_TakeSizes(self)),
        ]
        self._listeners = SizeListeners(self._model, self._modules)
        self._bystanders = Bystanders(self._model, self._modules)
        self._assigned = Assigned(self._modules)
        self._watch_loading()
        self._arm()

    def __deepcopy__(self, memo: dict[int, Any]) -> RankScheduler:
        # A model that keeps it is copied for an average: a copy would grow nothing.
        return self

    # What a user reads.

    @property
    def ranks(self) -> dict[str, int]:
        """Active rank of every module, by full name, in model order."""
        return {module.name: module.rank for module in self._modules}

    @property
    def total_rank(self) -> int:
        """Sum of the ranks; ``budget`` at the end, unless that is in parameters."""
        return sum(module.rank for module in self._modules)

    @property
    def spent(self) -> int:
        """What the ranks take of ``budget``, in its unit: ``total_rank``, or the components' parameters."""
        return self._budget.spent(self.ranks.values())

    @property
    def scores(self) -> dict[str, float]:
        """The smoothed scores S_k as of the last step (eq. 9 of the paper); with
        ``importance="gradient"`` sigma of every module as of the last growth, 0 before the first."""
        return dict(zip(self.ranks, self._scores.values().tolist(), strict=True))

    @property
    def orth_reg(self) -> float:
        """Value of the orthogonality regulariser now, without its weight (eq. 4)."""
        return float(self._plan.orthogonality())

    @property
    def history(self) -> npt.NDArray[np.void]:
        """A row for each growth: ``step``, ``module``, ``rank`` after it, ``importance`` (its score)."""
        width = max(len(module.name) for module in self._modules)
        kinds = [("step", "i8"), ("module", f"U{width}"), ("rank", "i8"), ("importance", "f8")]
        rows = [(step, self._modules[k].name, rank, score) for step, k, rank, score in self._history]
        return np.array(rows, dtype=kinds)

    def scalars(self) -> dict[str, float]:
        """Rank and score of every module as of the last step, as ``increlora/rank/NAME`` and
        ``increlora/score/NAME``: for TensorBoard's ``add_scalar``, for ``wandb.log``. The scores are those of
        :attr:`scores`: by the gradient they change at a growth alone."""
        ranks: dict[str, float] = {f"increlora/rank/{name}": rank for name, rank in self.ranks.items()}
        return ranks | {f"increlora/score/{name}": score for name, score in self.scores.items()}

    def on_growth(self, callback: Callable[[GrowthEvent], Any]) -> RemovableHandle:
        """Has ``callback(event)`` called whenever parameters of the adapter have changed their size.

        That is at the end of an optimizer step that ranks grew in; before a step, where an adapter of other
        ranks was loaded since the last; and in :meth:`detach`, where components in reserve are dropped.
        Optimizer state and DDP's buckets have followed by then. Every process is told alike. What a callback
        raises comes out of the step, and callbacks after it are not called. For averages there is
        :func:`increlora_rs.keep_average`.

        Args:
            callback: Takes a :class:`increlora_rs.GrowthEvent`; what it returns is not looked at.

        Returns:
            A handle; its ``remove()`` ends the calls.

        Raises:
            TypeError: ``callback`` cannot be called.
        """
        return self._listeners.add(callback)

    @untraced
    def detach(self) -> None:
        """Takes the hooks off the optimizer and stops growing; the adapter stays as it is, without
        components in reserve. Calling it again does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._watched is not None and vars(self._optimizer).get("load_state_dict") is self._watched:
            del self._optimizer.load_state_dict
        self._scores.detach()
        self._restart.find_young(())
        if self._probe.reloaded:
            self._take_loaded()
        self._drop_reserves()
        self._rebuild_buckets()
        self._probe.detach()
        ATTACHED.pop(self, None)
        self._group.pop(saved_state.KEY, None)
        self._tell("detach")

    # Set-up.

    @property
    def _group(self) -> dict[str, Any]:
        group: dict[str, Any] = self._optimizer.param_groups[0]
        return group

    def _watch_loading(self) -> None:
        """Has a state taken in that the optimizer loads without calling hooks, as bitsandbytes' do."""
        load = self._optimizer.load_state_dict
        if type(self._optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict:
            return

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = load(*args, **kwargs)
            self._take_state()
            return result

        self._watched = watched
        vars(self._optimizer)["load_state_dict"] = watched

    def _new_growth(self, first_ranks: list[int]) -> GrowthHistory:
        costs = None if self._budget.unit == "rank" else self._budget.costs
        return GrowthHistory(list(self.ranks), self.budget, first_ranks, costs=costs)

    def _start(self) -> None:
        self.schedule = new_schedule(self._config, self._modules, self._total_steps, self._budget)
        self._scores.start(self._seed, self.schedule.add_r)
        for module in self._modules:
            module.start()
        self._restart.adam_lead = steps_taken(self._optimizer, self._modules[0].a)
        self._update_may_grow()
        self._fill_reserves(range(len(self._modules)))
        for module in self._modules:
            module.follow(self._optimizer, self.step)
        self._rebuild_buckets()

    # One step.

    @untraced
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._depth.enters(optimizer):
            return None
        self._counts = False
        self._assigned.check_held(optimizer)
        self._probe.unattended = 0
        # args[0] is the optimizer.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._take_gradients(optimizer)
            return None
        self._check_loaded()

        def then_take_gradients() -> Any:
            loss = closure()
            with torch.no_grad():
                self._take_gradients(optimizer)
            return loss

        return (args[0], then_take_gradients, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    @untraced
    def _take_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Between the backward pass and the optimizer's update."""
        if not step_kinds.has_gradients(optimizer):
            # Whatever was collected is of a batch that was dropped.
            self._scores.forget_step()
            return
        if step_kinds.is_trial(optimizer):
            # Adam counts it, and newborn rows have to know.
            self._restart.adam_lead += 1
            return
        self._check_loaded()
        self._scores.note_step()
        smooth = self._probe.armed and self._scores.gauge.fused
        weight = self._config.orthogonality_weight
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if smooth or weight > 0.0:
            if smooth:
                average_(self._scores.gauge.total)
            self._plan.take_gradients_(
                smooth=smooth,
                weight=weight,
                loss_scale=self._scores.loss_scale() if smooth and grad_scale is None else None,
                grad_scale=grad_scale,
                found_inf=found_inf,
                stream=stream(self._scores.device),
            )
        if self._probe.armed:
            self._scores.take_step(grad_scale, found_inf)
        # A fused optimizer under a scaler is called, and does nothing, where gradients overflowed; others
        # are not called.
        if found_inf is not None and bool(found_inf):
            self._restart.skipped += 1
            return
        # Once, however often a closure is called.
        if not self._counts:
            self._counts = True
            self.step += 1
        self._restart.keep_old()

    @untraced
    def _after_step(self, *_: Any) -> None:
        if not self._depth.leaves() or not self._counts:
            return
        self._restart.correct(self.step)
        grows = self._may_grow and self.schedule.is_event(self.step)
        if grows:
            self._grow()
        self._growth.step = self.step
        self._arm()
        if grows:
            # Last, so that the scheduler is as it should be where a callback raises.
            self._tell("growth")

    def _update_may_grow(self, ranks: list[int] | None = None) -> None:
        """Can ranks still grow from these; None: from those of now?"""
        ranks = list(self.ranks.values()) if ranks is None else ranks
        room = self._room(ranks)
        left = self.budget - self._budget.spent(ranks)
        self._may_grow = any(cost <= left for cost, has in zip(self._budget.costs, room, strict=True) if has)

    def _room(self, ranks: list[int]) -> list[bool]:
        """Which modules would be below the largest rank that they may have?"""
        caps = caps_of(self._config, self._modules).tolist()
        return [rank < cap for rank, cap in zip(ranks, caps, strict=True)]

    def _arm(self) -> None:
        """Asks the backward passes of the next step for the importance, if a growth will need it."""
        following = self.step + 1
        wanted = self._may_grow and self._scores.wanted(self.schedule.next_event(following) - following)
        self._probe.arm(wanted)

    # Growth.

    def _grow(self) -> None:
        reached = self._scores.reached(self._optimizer)
        scores = self._scores.at_growth()
        if not scores.any():
            warnings.warn(
                f"step {self.step}: the importance of every module is 0, so the first modules in model "
                "order grow. Did the adapter take part in the loss?",
                UserWarning,
                stacklevel=2,
            )
        if not self._history:
            unreached.tell(self.step, self._modules, reached)
        chosen = unreached.choose(
            self.schedule,
            scores,
            ranks_of(self._modules),
            caps_of(self._config, self._modules),
            self.budget,
            reached,
        )
        for k, components in chosen:
            module = self._modules[k]
            module.grow(components, self._generator(k, "grow"), self._scores.directions(k, components))
            self._history.append((self.step, k, module.rank, float(scores[k])))
        ranks = list(self.ranks.values())
        self._growth.add(self.step, ranks, scores.tolist())
        self._config.growth = self._growth
        self._update_may_grow()
        if self._may_grow:
            self._fill_reserves(k for k, _ in chosen)
        else:
            self._drop_reserves()
        for k, _ in chosen:
            self._modules[k].follow(self._optimizer, self.step)
        self._config.rank_pattern = rank_pattern(self.ranks)
        self._restart.find_young(self._modules)
        self._rebuild_buckets()
        total = self._budget.told(ranks, "of")
        logger.info("step %d: %d modules grew, total rank %s", self.step, len(chosen), total)
        # What is left of a budget in parameters may pay for no component of those with room.
        if self.spent < self.budget and not any(self._room(ranks)):
            warnings.warn(
                f"no module can grow any more, but the total rank is {self._budget.told(ranks)}: "
                f"every module is at max_r={self._config.max_r} or at min(in, out). Raise max_r, adapt more "
                "modules, or lower r.",
                UserWarning,
                stacklevel=2,
            )

    def _generator(self, module: int, purpose: str) -> torch.Generator:
        """The same numbers in every process and after a resume."""
        return generator(self._seed, self.step, module, purpose)

    def _fill_reserves(self, indices: Iterable[int]) -> None:
        if not self._config.uses_reserve or not self._may_grow:
            return
        caps = caps_of(self._config, self._modules)
        for k in indices:
            module = self._modules[k]
            room = int(caps[k]) - module.rank
            module.set_reserve(min(self.schedule.add_r, room), self._generator(k, "reserve"))

    def _drop_reserves(self) -> None:
        for module in self._modules:
            if module.rows > module.rank:
                module.set_reserve(0)
                module.follow(self._optimizer, self.step)

    def _tell(self, cause: Cause) -> None:
        """Tells those who hold copies of the parameters that sizes changed, if they did."""
        self._assigned.note()
        before = self._listeners.known
        if self._listeners.tell(self.step, cause) and cause == "growth":
            self._bystanders.warn(self.step, before)

    def _rebuild_buckets(self) -> None:
        ddp = find_ddp(self._model)
        if ddp is not None:
            rebuild_buckets(ddp)

    # State.

    @untraced
    def _save(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        schedule = self.schedule
        state = {
            "version": saved_state.VERSION,
            "step": self.step,
            "total_steps": self._total_steps,
            "budget": self.budget,
            "budget_unit": self._budget.unit,
            "seed": self._seed,
            "modules": list(self.ranks),
            "ranks": list(self.ranks.values()),
            "schedule": [schedule.tinit, schedule.deltaT, schedule.top_h, schedule.add_r],
            "adam_lead": self._restart.adam_lead,
            "was_linear": self._restart.was_linear,
            "skipped": self._restart.skipped,
            "importance": self._config.importance,
            "scores": self._scores.state(),
            "row_births": [list(module.row_births) for module in self._modules],
            "e_births": [list(module.e_births) for module in self._modules],
            "reserve": [module.reserve_factors() for module in self._modules],
            "history": [list(row) for row in self._history],
            "growth": self._growth.state(),
        }
        state_dict["param_groups"][0][saved_state.KEY] = saved_state.pack(state)

    @untraced
    def _after_load(self, *_: Any) -> None:
        # Without hooks, an optimizer's own `state_dict` gives what stands in the group.
        saved = self._group.get(saved_state.KEY, saved_state.HELD)
        if saved != saved_state.HELD:
            self._restore(saved)
            self._group[saved_state.KEY] = saved_state.HELD
            self._arm()
            return
        self._group[saved_state.KEY] = saved_state.HELD
        warnings.warn(
            "optimizer: the loaded state holds none of an IncreLoRA scheduler; the scores start anew",
            UserWarning,
            stacklevel=2,
        )

    def _take_state(self) -> None:
        """Takes in a state that came into the group without a hook's being called."""
        if self._group.setdefault(saved_state.KEY, saved_state.HELD) != saved_state.HELD:
            self._after_load()

    def _restore(self, value: Any) -> None:
        saved = saved_state.unpack(value)
        saved_state.check(saved, list(self.ranks), self._config, self._total_steps, self._budget)
        self.step = saved["step"]
        self.restored = True
        self._seed = saved["seed"]
        self.schedule = schedule_of(
            self._config, self._modules, self._total_steps, self._budget, saved["schedule"]
        )
        self._restart.adam_lead = saved["adam_lead"]
        self._restart.was_linear = saved["was_linear"]
        self._restart.skipped = saved.get("skipped", 0)
        self._scores.start(self._seed, self.schedule.add_r)
        self._scores.restore(saved["scores"])
        self._history = [(int(s), int(k), int(r), float(i)) for s, k, r, i in saved["history"]]
        self._restore_growth(saved)
        for k, module in enumerate(self._modules):
            module.row_births = list(saved["row_births"][k])
            module.e_births = list(saved["e_births"][k])
            # A saved adapter has no reserve; a state_dict of the model does.
            if module.rank == saved["ranks"][k] == module.rows:
                module.add_reserve(*saved["reserve"][k])
        births = [len(module.row_births) for module in self._modules]
        self._expected = list(zip(saved["ranks"], births, strict=True))
        # Those of the model may come after the optimizer's state, and a backward pass before the next look.
        self._update_may_grow(saved["ranks"])
        self._rebuild_buckets()

    def _restore_growth(self, saved: dict[str, Any]) -> None:
        first_ranks = [births.count(0) for births in saved["e_births"]]
        self._growth = self._new_growth(first_ranks)
        if "growth" in saved:
            self._growth.restore(saved["growth"])
        else:
            self._growth.rebuild(self._history)
        self._growth.step = self.step
        if self._growth.steps:
            self._config.growth = self._growth

    def _check_loaded(self) -> None:
        """Before a step: do births and optimizer state fit parameters that were loaded meanwhile?"""
        self._take_state()
        if self._expected is None:
            if self._assigned.changed() or self._probe.reloaded:
                self._take_loaded()
                self._tell("load")
            return
        for module, expected in zip(self._modules, self._expected, strict=True):
            if (module.rank, module.rows) != expected:
                raise ValueError(
                    f"model: {module.name!r} has rank {module.rank} and {module.rows} rows, but the resumed "
                    f"optimizer state is of rank {expected[0]} and {expected[1]} rows; load the adapter of "
                    "the same checkpoint into the model before the optimizer's state."
                )
        self._expected = None
        self._probe.reloaded = False
        self._update_may_grow()
        self._restart.find_young(self._modules)
        self._tell("load")

    def _take_loaded(self) -> None:
        """An adapter of other ranks was loaded without its optimizer: its rows are as if from the start."""
        self._probe.reloaded = False
        for module in self._modules:
            if (len(module.row_births), len(module.e_births)) != (module.rows, module.rank):
                module.follow(self._optimizer, self.step)
                module.start()
        self._update_may_grow()
        self._restart.find_young(self._modules)
        self._rebuild_buckets()
