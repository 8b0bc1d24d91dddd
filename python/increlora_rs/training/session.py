"""One training of one adapter: its policy called at every step, and what follows a change of sizes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..contract.policy import Event, Plan, Policy, Step
from ..resizing.ddp import rebuild_buckets
from ..resizing.optimizer_starts import steps_taken
from ..support.history import GrowthHistory
from ..support.warning import warn
from . import checkpoint, step_kinds
from .assigned import Assigned
from .bystanders import BEGUN_ANEW, Bystanders
from .distributed import average_, from_holder
from .events import Cause, SizeListeners
from .forms import form_of
from .hooks import Hooks
from .modules import AdaptedModule
from .pieces import Whole
from .replicas import Replicas
from .scaler import ScalerWatch

logger = logging.getLogger(__package__)

# Makes the policy of modules, configuration and plan: a class, or a function.
PolicyMaker = Callable[[list[AdaptedModule], Any, Plan], Policy]


class Session:
    """What :class:`RankScheduler` is made of; called by the optimizer's hooks.

    Args:
        model: The model, out of its wrappers.
        modules: Its adapted modules.
        make_policy: What decides.
        plan: What is known before the first step.
        method: Name of the adapter's method.
        scaler: The ``GradScaler`` of a float16 training, or None.
        zero: The optimizer of DeepSpeed's that has the plan's train pieces, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: list[AdaptedModule],
        make_policy: PolicyMaker,
        plan: Plan,
        method: str,
        scaler: Any | None,
        zero: Any | None = None,
    ) -> None:
        self.model, self.modules, self.optimizer, self.method = model, modules, plan.optimizer, method
        layer, adapter = modules[0].layer, modules[0].adapter
        self.config, self.probe = layer.configs[adapter], layer.probes[adapter]
        self._form = form_of(model, modules, plan.optimizer, zero)
        saved = self._group.get(checkpoint.KEY, checkpoint.HELD)
        # A state that the first process loads for all (broadcast_from_rank0) has unknown entries there alone.
        saved = from_holder(None if saved == checkpoint.HELD else saved, plan.device)
        # Before anything is at work on the parameters, for a state may say how many rows they have.
        state = None if saved is None else self._read(saved, plan.total_steps)
        with self._form.at_work():
            plan = dataclasses.replace(plan, optimizer=self._form.optimizer)
            self.policy = make_policy(modules, self.config, plan)
        self.step = 0
        self.restored = False
        # Rows of `history`: step, module, rank, score.
        self.growths: list[tuple[int, int, int, float]] = []
        self._history = self._new_history([module.rank for module in modules])
        # Steps that the optimizer's state counts beyond ours, and calls that a schedule may have counted.
        self._lead = self._skipped = 0
        # The step of the optimizer's call at hand; None: it does not count, or not yet.
        self._at: Step | None = None
        # Ranks and rows of a resumed state that the model has not been seen to have.
        self._expected: list[tuple[int, int]] | None = None
        self._scaler = ScalerWatch(scaler, self._drop_gauge)
        self._replicas = Replicas(model, modules, self.optimizer, self.places.is_sharded)
        if state is None:
            with self._form.at_work():
                self._start()
            self._form.share()
        else:
            self._restore(state)
        self._group[checkpoint.KEY] = checkpoint.HELD
        self._attach()
        self.listeners = SizeListeners(model, modules)
        self._bystanders = Bystanders(model, modules, self.places.is_sharded)
        self._assigned = Assigned(modules)
        self._hooks = Hooks(self.optimizer, self, zero)
        self._arm()

    @property
    def _group(self) -> dict[str, Any]:
        group: dict[str, Any] = self.optimizer.param_groups[0]
        return group

    @property
    def places(self) -> Whole:
        """Where the numbers of the adapter are: in this process, or a piece of them."""
        return self._form.places

    def at_work(self) -> AbstractContextManager[None]:
        """Within it the modules' factors are as the model has them, whichever form it is in."""
        return self._form.at_work() if self.probe.attached else nullcontext()

    # Beginning and end.

    def _start(self) -> None:
        for module in self.modules:
            module.start()
        # A parameter without rows has no state that counts.
        first = next((module for module in self.modules if module.rows), self.modules[0])
        self._lead = steps_taken(self._form.optimizer, first.trained[0])
        self.policy.start()
        self._follow()

    def _attach(self) -> None:
        adapter = self.modules[0].adapter
        self.probe.attach(self.policy.gauge)
        self.probe.reloaded = False
        for slot, module in enumerate(self.modules):
            module.layer.probes[adapter] = self.probe
            module.layer.slots[adapter] = slot
        self._form.begin()

    def close(self) -> None:
        """The training is over: nothing is left but the adapter."""
        self._hooks.remove()
        self._replicas.close()
        self._scaler.detach()
        with self._form.at_work():
            if self.probe.reloaded:
                self._take_loaded()
            self.policy.finish()
            self._follow()
        self._form.share()
        self.probe.detach()
        self._group.pop(checkpoint.KEY, None)
        self._tell("detach")
        self._form.end()

    # One step.

    def trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Is the step of ``optimizer`` that begins or ends one of the adapter?"""
        return self._form.trained_by(optimizer)

    def begin_step(self) -> None:
        """The optimizer's ``step`` was called."""
        self._at = None
        self._form.settle()
        self._assigned.check_held(self.optimizer)
        self.probe.unattended = 0

    def take_gradients(self) -> None:
        """Between the backward pass and the optimizer's update."""
        if not self._form.in_any(step_kinds.has_gradients(self.optimizer)):
            # Whatever was collected is of a batch that was dropped.
            self._drop_gauge()
            return
        trial = step_kinds.is_trial(self.optimizer) and not self._measured()
        if not self._form.in_any(not trial):
            # Adam counts it, and newborn rows have to know.
            self._lead += 1
            return
        self._replicas.average()
        with self._form.at_work():
            self._prepare(self.optimizer)

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        self.check_loaded()
        self._replicas.check(deciding=self.policy.decides(self.step + 1))
        # Some optimizers divide by the number of elements.
        for parameter in self._assigned.empty:
            parameter.grad = None
        self._scaler.note_step()
        found_inf = getattr(optimizer, "found_inf", None)
        at = Step(
            # Once, however often a closure is called.
            number=self.step + 1 if self._at is None else self.step,
            armed=self.probe.armed,
            lead=self._lead,
            skipped=self._skipped,
            grad_scale=getattr(optimizer, "grad_scale", None),
            found_inf=found_inf,
            ask_loss_scale=self._scaler.loss_scale,
        )
        if self.probe.armed and self.policy.gauge is not None:
            average_(self.policy.gauge.total)
        with torch.no_grad():
            self.policy.before_step(at)
        # A fused optimizer under a scaler is called, and does nothing, where gradients overflowed; others
        # are not called.
        if found_inf is not None and bool(found_inf):
            self._skipped += 1
            return
        self._at, self.step = at, at.number

    def end_step(self) -> None:
        """After the optimizer's update."""
        if self._at is None:
            return
        with self._form.at_work(), torch.no_grad():
            event = self.policy.after_step(self._at)
            if event is not None:
                self._take(event)
        self._history.step = self.step
        self._arm()
        if event is None:
            return
        # Last, so that the scheduler is as it should be where a warning or a callback raises.
        if event.warning is not None:
            warn(event.warning)
        if event.resized:
            self._tell("growth")
        elif not self.policy.averages:
            self._bystanders.warn(self.step, self.listeners.known, self.modules, BEGUN_ANEW)

    def _take(self, event: Event) -> None:
        ranks, scores = self.policy.ranks(), event.scores.tolist()
        self.growths += [(self.step, k, ranks[k], scores[k]) for k in event.changed]
        self._history.add(self.step, ranks, scores)
        self.probe.history = self._history
        for parameter in event.restarted:
            self._form.start_anew(parameter)
        if event.resized:
            self._follow()
            self.config.note_ranks({module.name: module.rank for module in self.modules})
            self.policy.resized()
        logger.info("step %d: %s", self.step, event.line)

    def _arm(self) -> None:
        """Asks the backward passes of the next step for the gauge, if the policy wants it."""
        if self.policy.gauge is not None:
            self.probe.arm(self.policy.wants(self.step + 1))

    def _measured(self) -> bool:
        """Did a backward pass add to the gauge? Where no module has anything, gradients have no element, and
        none that is not 0."""
        gauge = self.policy.gauge
        return self.probe.armed and gauge is not None and bool(gauge.total.any())

    def _drop_gauge(self) -> None:
        """Drops what the backward passes since the last step added."""
        if self.policy.gauge is not None:
            self.policy.gauge.total.zero_()

    def _follow(self) -> None:
        """Births, optimizer state and DDP's buckets, after rows came or went."""
        for module in self.modules:
            module.follow(self.step, self.step + self._lead)
        self.rebuild_buckets()

    def _tell(self, cause: Cause) -> None:
        """Tells those who hold copies of the parameters that rows came or went, if they did."""
        if cause == "growth":
            self._assigned.note_sizes()
        else:
            self._assigned.note()
        if cause == "load":
            self._replicas.begin()
        before = self.listeners.known
        changed = self.listeners.tell(self.step, cause)
        if changed and cause == "growth":
            self._bystanders.warn(self.step, before, changed)

    def rebuild_buckets(self) -> None:
        """DDP's, for parameters that changed their size."""
        if self._form.resizes:
            for ddp in self._replicas.wrappers():
                rebuild_buckets(ddp)

    # State.

    def _new_history(self, first_ranks: list[int]) -> GrowthHistory:
        names = [module.name for module in self.modules]
        return GrowthHistory(names, self.policy.budget, first_ranks, costs=self.policy.costs)

    def save(self, state_dict: dict[str, Any]) -> None:
        """Puts the training's state into the optimizer's."""
        gauge = self.policy.gauge
        state = {
            "version": checkpoint.VERSION,
            "method": self.method,
            "step": self.step,
            "total_steps": self.policy.plan.total_steps,
            "seed": self.policy.plan.seed,
            "lead": self._lead,
            "skipped": self._skipped,
            "modules": [module.name for module in self.modules],
            "ranks": [module.rank for module in self.modules],
            "births": [[list(births) for _, _, births in module.parameters] for module in self.modules],
            "history": [list(row) for row in self.growths],
            "growth": self._history.state(),
            "gauge": gauge.total.clone() if gauge is not None and bool(gauge.total.any()) else None,
            "policy": self.policy.state_dict(),
        }
        state_dict["param_groups"][0][checkpoint.KEY] = checkpoint.pack(state)

    def after_load(self) -> None:
        """Takes in what the optimizer has loaded."""
        # Without hooks, an optimizer's own `state_dict` gives what stands in the group.
        saved = self._group.get(checkpoint.KEY, checkpoint.HELD)
        if saved != checkpoint.HELD:
            self._restore(self._read(saved, self.policy.plan.total_steps))
            self._group[checkpoint.KEY] = checkpoint.HELD
            self._arm()
            return
        self._group[checkpoint.KEY] = checkpoint.HELD
        warn("optimizer: the loaded state holds none of a scheduler's; the scores start anew")

    def take_state(self) -> None:
        """Takes in a state that came into the group without a hook's being called."""
        if self._group.setdefault(checkpoint.KEY, checkpoint.HELD) != checkpoint.HELD:
            self.after_load()

    def _read(self, value: Any, total_steps: int | None) -> dict[str, Any]:
        """A state that was found, if it is of this training."""
        saved = checkpoint.unpack(value)
        checkpoint.check(saved, self.method, [module.name for module in self.modules], total_steps)
        self._form.expect(saved["births"])
        return saved

    def _restore(self, saved: dict[str, Any]) -> None:
        with self._form.at_work():
            self._restore_from(saved)
        self._form.share()

    def _restore_from(self, saved: dict[str, Any]) -> None:
        self.step, self._lead, self._skipped = saved["step"], saved["lead"], saved["skipped"]
        self.restored = True
        self.policy.plan = dataclasses.replace(self.policy.plan, seed=saved["seed"])
        self.policy.load_state_dict(saved["policy"])
        self._drop_gauge()
        gauge, total = self.policy.gauge, saved["gauge"]
        # Of another size it is another gauge's.
        if gauge is not None and total is not None and total.shape == gauge.total.shape:
            gauge.total.copy_(total)
        self.growths = [(int(s), int(k), int(r), float(i)) for s, k, r, i in saved["history"]]
        self._history = self._new_history(saved["growth"]["first_ranks"])
        self._history.restore(saved["growth"])
        self._history.step = self.step
        if self._history.steps:
            self.probe.history = self._history
        self._expected = []
        for module, rank, of_all in zip(self.modules, saved["ranks"], saved["births"], strict=True):
            for (_, _, births), steps in zip(module.parameters, of_all, strict=True):
                births[:] = steps
            self._expected.append((rank, module.rows_of(rank, [len(births) for births in of_all])))
        self.rebuild_buckets()

    def check_loaded(self) -> None:
        """Before a step: do births and optimizer state fit parameters that were loaded meanwhile?"""
        self.take_state()
        with self._form.at_work():
            self._check_loaded()

    def _check_loaded(self) -> None:
        if self._expected is None:
            if self._assigned.changed() or self.probe.reloaded:
                self._take_loaded()
                self._tell("load")
            return
        for module, expected in zip(self.modules, self._expected, strict=True):
            if (module.rank, module.rows) != expected:
                raise ValueError(
                    f"model: {module.name!r} has rank {module.rank} and {module.rows} rows, but the resumed "
                    f"optimizer state is of rank {expected[0]} and {expected[1]} rows; load the adapter of "
                    "the same checkpoint into the model before the optimizer's state."
                )
        self._expected = None
        self.probe.reloaded = False
        self.policy.resized()
        self._tell("load")

    def _take_loaded(self) -> None:
        """An adapter of other ranks was loaded without its optimizer: its rows are as if from the start."""
        self.probe.reloaded = False
        for module in self.modules:
            if any(len(births) != parameter.shape[dim] for parameter, dim, births in module.parameters):
                module.follow(self.step)
                module.start()
        self.policy.resized()
        self.rebuild_buckets()
