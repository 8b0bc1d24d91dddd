"""``attach``, and what it returns: the ranks of a training, their history, and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..contract.policy import LrSchedule, Plan, Policy
from ..resizing.cut import device_of, reshard
from ..support import arguments
from ..support.capacity import Capacity, data_of
from ..support.untraced import untraced
from ..support.warning import warn
from . import deepspeed
from .distributed import shared_seed
from .events import GrowthEvent
from .fit import ATTACHED, check_attachable, trainable_adapter, unwrapped_optimizer
from .hooks import hooked
from .modules import adapted_modules
from .session import PolicyMaker, Session

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
    policy: PolicyMaker | None = None,
) -> RankScheduler:
    """Makes the ranks of ``model`` grow while ``optimizer`` trains it.

    Call it once, after the optimizer was made and before the first step; with ``Trainer`` use
    ``IncreLoraCallback`` instead. It puts hooks on the optimizer; the training loop stays as it is.

    Args:
        model: A model with one trainable adapter, with or without DistributedDataParallel.
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
        policy: For experiments: what decides in the place of the method's own policy, a class or function of
            the adapted modules, the configuration and a ``Plan`` (``increlora_rs.contract.policy``). With
            ``functools.partial(Growth, choose_by=...)`` modules are chosen by other scores.

    Returns:
        The scheduler: ``ranks``, ``total_rank``, ``budget``, ``scores``, ``history``, ``detach()``.

    Raises:
        ValueError: the model has no trainable adapter of ours, or several; the optimizer does not
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
        policy=policy,
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, DeepSpeed's engine or torch.compile."""
    while True:
        if isinstance(model, _WRAPPERS) or deepspeed.is_engine(model):
            inner: Any = model.module
            model = inner
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _parameters_of(policy: Policy) -> int:
    """The numbers that are trained when the budget is spent; without a budget those that are now."""
    if policy.budget is None:
        return sum(parameter.numel() for module in policy.modules for parameter in module.factors)
    if policy.costs is not None:
        return policy.budget
    sizes = [module.layer.out_features + module.layer.in_features + 1 for module in policy.modules]
    return round(policy.budget * sum(sizes) / len(sizes))


def _total_steps_of(config: Any, given: int | None) -> int | None:
    """Steps of the training: those given, else those of a configuration that has any; told where they
    differ."""
    arguments.integer("total_steps", given, at_least=1, optional=True)
    configured: int | None = getattr(config, "total_step", None)
    if given is not None and configured is not None and given != configured:
        warn(
            f"total_step={configured} in {type(config).__name__}, but the training has {given} steps; the "
            "schedule is made for the latter"
        )
    return configured if given is None else given


def _check_lr(lr_schedule: LrSchedule, lr_warmup_steps: int, total_steps: int | None) -> None:
    if lr_schedule not in ("auto", "linear", "follow"):
        raise ValueError(f"lr_schedule={lr_schedule!r} is unknown; it must be 'auto', 'linear' or 'follow'.")
    arguments.integer("lr_warmup_steps", lr_warmup_steps, at_least=0)
    if lr_schedule == "linear" and total_steps is None:
        raise ValueError(
            "lr_schedule='linear' with total_steps=None: where the learning rate is 0 is not known; give "
            "attach(..., total_steps=...), or lr_schedule='follow'."
        )


class _TakeSizes:
    """After a load: buckets of the sizes of before would leave the next gradients to each process alone.

    It keeps the scheduler as long as the model is there; copies and pickles of the model take none along.
    """

    def __init__(self, scheduler: RankScheduler | None = None) -> None:
        self._scheduler = scheduler

    def __call__(self, model: nn.Module, _: Any) -> None:
        if self._scheduler is not None and self._scheduler.session.probe.reloaded:
            self._scheduler.session.rebuild_buckets()

    def __reduce__(self) -> tuple[type[_TakeSizes], tuple[()]]:
        return _TakeSizes, ()


class RankScheduler:
    """Allocates ranks during training; made by :func:`attach`.

    Attributes:
        policy: What decides, of the adapter's method: for IncreLoRA
            ``increlora_rs.methods.increlora.growth.Growth``.
        method: Name of that method.
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
        policy: PolicyMaker | None,
    ) -> None:
        zero = deepspeed.zero_of(model, optimizer)
        model = _unwrapped(model)
        reshard(model)
        optimizer = unwrapped_optimizer(optimizer if zero is None else zero.optimizer)
        modules = adapted_modules(model, trainable_adapter(model, adapter_name))
        check_attachable(modules, optimizer, zero)
        if hooked(optimizer):
            raise ValueError(
                "optimizer: a scheduler is attached to it already, and its checkpoint has room for one; call "
                "that one's detach() first, or give each adapter an optimizer of its own."
            )
        config = modules[0].layer.configs[modules[0].adapter]
        total_steps = _total_steps_of(config, total_steps)
        _check_lr(lr_schedule, lr_warmup_steps, total_steps)
        device = device_of(modules[0].parameters[0][0])
        seed = shared_seed(torch.initial_seed(), device)
        plan = Plan(seed, total_steps, lr_warmup_steps, lr_schedule, optimizer, device)
        self.method = config.method.name
        make = policy or config.policy or Policy
        self.session = Session(model, modules, make, plan, self.method, scaler, zero)
        ATTACHED[self] = self.session.probe
        self._loaded = model.register_load_state_dict_post_hook(_TakeSizes(self))
        self._attached = True

    def __deepcopy__(self, memo: dict[int, Any]) -> RankScheduler:
        # A model that keeps it is copied for an average: a copy would grow nothing.
        return self

    @property
    def policy(self) -> Policy:
        """What decides."""
        return self.session.policy

    @property
    def step(self) -> int:
        """Optimizer steps taken. A call of ``optimizer.step`` that moves nothing is none: without a gradient,
        skipped by a loss scaler, or the trial by which ``torch.distributed.checkpoint.state_dict`` makes a
        fresh optimizer's state."""
        return self.session.step

    @step.setter
    def step(self, number: int) -> None:
        self.session.step = number

    @property
    def restored(self) -> bool:
        """Was the state of an earlier run found in the optimizer?"""
        return self.session.restored

    @property
    def ranks(self) -> dict[str, int]:
        """Active rank of every module, by full name, in model order."""
        return self._by_name(self.policy.ranks())

    @property
    def total_rank(self) -> int:
        """Sum of the ranks; ``budget`` at the end, where that is in ranks."""
        return sum(self.policy.ranks())

    @property
    def scores(self) -> dict[str, float]:
        """What the components of each module did in all, as of the last event, 0 before the first; with
        ``importance="gradient"`` sigma of every module as of the last growth; with ``"sensitivity"`` the
        smoothed scores S_k as of the last step (eq. 9 of the paper)."""
        return self._by_name(self.policy.scores().tolist())

    @property
    def history(self) -> npt.NDArray[np.void]:
        """A row for each module that an event changed: ``step``, ``module``, ``rank`` after it,
        ``importance`` (its score)."""
        names = [module.name for module in self.session.modules]
        kinds = [("step", "i8"), ("module", f"U{max(map(len, names))}"), ("rank", "i8"), ("importance", "f8")]
        rows = [(step, names[k], rank, score) for step, k, rank, score in self.session.growths]
        return np.array(rows, dtype=kinds)

    @property
    def budget(self) -> int:
        """The numbers that components of rank ``config.r`` everywhere train, in + out + 1 each; with
        ``budget_unit="rank"``, as where ranks grow, ``config.r`` times the number of modules."""
        if self.policy.budget is None:
            raise AttributeError(self._has_no("budget"))
        return self.policy.budget

    @property
    def spent(self) -> int:
        """What the ranks take of ``budget``, in its unit: ``total_rank``, or the components' parameters."""
        return self._of_policy("spent")

    @property
    def schedule(self) -> Any:
        """When ranks move (``tinit``, ``deltaT``, ``end``), or when and how much they grow (``tinit``,
        ``deltaT``, ``top_h``, ``add_r``)."""
        return self._of_policy("schedule")

    @property
    def orth_reg(self) -> float:
        """Value of the orthogonality regulariser now, without its weight (eq. 4)."""
        return self._of_policy("orth_reg")

    def scalars(self) -> dict[str, float]:
        """Rank and score of every module as of the last step, as ``increlora/rank/NAME`` and
        ``increlora/score/NAME``: for TensorBoard's ``add_scalar``, for ``wandb.log``. The scores are those of
        :attr:`scores`: by the gradient they change at a growth alone."""
        return {f"{self.method}/{name}": value for name, value in self.policy.scalars().items()}

    def logs(self) -> dict[str, float]:
        """Numbers for the log of a training step: ``total_rank``, and the method's own, as ``orth_reg``."""
        return {"total_rank": self.total_rank, **self.policy.logs()}

    def capacity(self, data: Any = None) -> Capacity:
        """How many bits the adapter can hold at the end, beside those of its data; as a string one line that
        says what follows for the ranks. The callback logs it before the first step.

        Args:
            data: The data set of the training, rows that are mappings with ``labels``, ``label`` or
                ``input_ids``; or what it holds, in bits; None: not known.

        Returns:
            ``bits``, ``parameters``, ``data`` (None where nothing is known of them), and ``str()`` of it.

        Raises:
            TypeError, ValueError: ``data`` is no number above 0 where it is a number.
        """
        return Capacity(_parameters_of(self.policy), data_of(data))

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
        return self.session.listeners.add(callback)

    @untraced
    def detach(self) -> None:
        """Takes the hooks off the optimizer and stops growing; the adapter stays as it is, without
        components in reserve. Calling it again does nothing."""
        if self._attached:
            self._attached = False
            self._loaded.remove()
            ATTACHED.pop(self, None)
            self.session.close()

    def _by_name(self, values: list[Any]) -> dict[str, Any]:
        names = [module.name for module in self.session.modules]
        return dict(zip(names, values, strict=True))

    def _of_policy(self, name: str) -> Any:
        if not hasattr(type(self.policy), name) and name not in vars(self.policy):
            raise AttributeError(self._has_no(name))
        return getattr(self.policy, name)

    def _has_no(self, name: str) -> str:
        return f"a scheduler of {self.method!r} has no {name!r}, for {type(self.policy).__name__} has none"
