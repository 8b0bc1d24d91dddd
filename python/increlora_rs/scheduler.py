"""Growing the ranks during training: hooks on the optimizer, so that every loop works."""

from __future__ import annotations

import hashlib
import logging
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from . import _core
from .config import IncreLoraConfig
from .layer import Linear
from .model import adapted_layers, rank_pattern, short
from .optimizer_state import resize_state

logger = logging.getLogger(__name__)

# Key of the scheduler's state in the optimizer's first parameter group: there it travels with every
# checkpoint of the optimizer, and is found whether it is loaded before or after `attach`.
STATE_KEY = "increlora"
_STATE_VERSION = 1

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)

LrSchedule = Literal["auto", "linear", "follow"]


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
        model: A model with one trainable IncreLoRA adapter.
        optimizer: The torch optimizer that holds the adapter's parameters (an
            ``AcceleratedOptimizer`` is unwrapped).
        total_steps: Optimizer steps of the training; None: ``config.total_step``. Needed unless
            ``tinit``, ``deltaT`` and ``top_h`` are all set.
        lr_warmup_steps: Steps of the learning rate's linear warm-up; new components repeat it.
        lr_schedule: "linear": the learning rate decays linearly to 0 at ``total_steps``, and new
            components get a decay of their own (section 3.3 of the paper); "follow": new components
            warm up to whatever the schedule has and follow it; "auto": "linear" if that is what the
            learning rate did until a component is born.
        scaler: The ``GradScaler`` of a float16 training.
        adapter_name: Which adapter; None: the trainable one.

    Returns:
        The scheduler: ``ranks``, ``total_rank``, ``budget``, ``scores``, ``history``, ``detach()``.

    Raises:
        ValueError: the model has no trainable IncreLoRA adapter, or several; the optimizer does not
            hold its parameters; the number of steps is unknown; a scheduler is attached already; the
            adapter is merged.
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


@dataclass
class _Module:
    """One adapted module: its layer, and the step at which each of its rows was born."""

    name: str
    layer: Linear
    row_births: list[int] = field(default_factory=list)
    e_births: list[int] = field(default_factory=list)


class RankScheduler:
    """Allocates ranks during training; made by :func:`attach`.

    Attributes:
        schedule: When and how much the ranks grow (``tinit``, ``deltaT``, ``top_h``, ``add_r``).
        budget: Total rank at the end: ``config.r`` times the number of modules.
        step: Optimizer steps taken.
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
        self._model = model.module if isinstance(model, _WRAPPERS) else model
        self._optimizer = _unwrapped(optimizer)
        self._scaler = scaler
        self._adapter = _trainable_adapter(self._model, adapter_name)
        layers = adapted_layers(self._model, self._adapter)
        self._modules = [_Module(short(name), layer) for name, layer in layers.items()]
        self._config = self._first.configs[self._adapter]
        self._check()
        if lr_schedule not in ("auto", "linear", "follow"):
            raise ValueError(
                f"lr_schedule={lr_schedule!r} is unknown; it must be 'auto', 'linear' or 'follow'."
            )
        if lr_warmup_steps < 0:
            raise ValueError(f"lr_warmup_steps={lr_warmup_steps} is negative; give 0 or more.")
        self._lr_schedule = lr_schedule
        self._lr_warmup = lr_warmup_steps
        self._was_linear = True
        self._total_steps = self._config.total_step if total_steps is None else total_steps
        self.budget = self._config.r * len(self._modules)
        self.step = 0
        self.restored = False
        self._seed = torch.initial_seed()
        self._history: list[tuple[int, int, int, float]] = []
        self._young: list[tuple[nn.Parameter, Tensor, list[int], int]] = []
        self._adam_lead = 0
        self._expected_ranks: list[int] | None = None
        self._may_grow = False
        self._window = self._window_steps()

        device = self._first.lora_A[self._adapter].device
        shape = len(self._modules)
        self._mean = torch.zeros(shape, dtype=torch.float64, device=device)
        self._uncertainty = torch.zeros_like(self._mean)
        self._importance = torch.zeros_like(self._mean)
        self._norm = torch.tensor(
            [self._normaliser(module.layer) for module in self._modules],
            dtype=torch.float64,
            device=device,
        )

        self._probe = self._first.probes[self._adapter]
        self._probe.attached = True
        for slot, module in enumerate(self._modules):
            module.layer.probes[self._adapter] = self._probe
            module.layer.slots[self._adapter] = slot
        if STATE_KEY in self._group:
            self._read_state()
        else:
            self._start()
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
            self._optimizer.register_state_dict_pre_hook(self._write_state),
            self._optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        self._arm()

    # What a user reads.

    @property
    def ranks(self) -> dict[str, int]:
        """Active rank of every module, by full name, in model order."""
        return {module.name: module.layer.r[self._adapter] for module in self._modules}

    @property
    def total_rank(self) -> int:
        """Sum of the ranks; ``budget`` at the end."""
        return sum(self.ranks.values())

    @property
    def scores(self) -> dict[str, float]:
        """The smoothed scores S_k as of the last step (eq. 9 of the paper)."""
        values = (self._mean * self._uncertainty).tolist()
        return dict(zip(self.ranks, values, strict=True))

    @property
    def orth_reg(self) -> float:
        """Value of the orthogonality regulariser now, without its weight (eq. 4)."""
        a, b = self._factors()
        return float(_core.orthogonality(a, b))

    @property
    def history(self) -> npt.NDArray[np.void]:
        """A row for each growth: ``step``, ``module``, ``rank`` after it, ``importance`` (S_k)."""
        width = max(len(module.name) for module in self._modules)
        kinds = [("step", "i8"), ("module", f"U{width}"), ("rank", "i8"), ("importance", "f8")]
        rows = [(step, self._modules[k].name, rank, score) for step, k, rank, score in self._history]
        return np.array(rows, dtype=kinds)

    def detach(self) -> None:
        """Takes the hooks off the optimizer and stops growing; the adapter stays as it is, without
        components in reserve. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._drop_reserves()
        self._probe.importance = None
        self._probe.attached = False
        self._group.pop(STATE_KEY, None)

    # Set-up.

    @property
    def _first(self) -> Linear:
        return self._modules[0].layer

    @property
    def _group(self) -> dict[str, Any]:
        group: dict[str, Any] = self._optimizer.param_groups[0]
        return group

    def _check(self) -> None:
        if self._first.probes[self._adapter].attached:
            raise ValueError(
                "model: a scheduler is attached to this adapter already; call its detach() first, and "
                "use either attach() or IncreLoraCallback."
            )
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for module in self._modules:
            if self._adapter in module.layer.merged_adapters:
                raise ValueError(
                    f"model: adapter {self._adapter!r} is merged into the base weights; call "
                    "unmerge_adapter() before training."
                )
            for factor, _ in self._parameters(module):
                if id(factor) not in held:
                    raise ValueError(
                        f"optimizer: it does not hold the adapter's parameters of {module.name!r}; "
                        "make it from the parameters of the model that get_peft_model returned, "
                        "after that call."
                    )

    def _plan(self) -> _core.Schedule:
        config, total = self._config, self._total_steps
        if total is None:
            if None in (config.tinit, config.deltaT, config.top_h):
                raise ValueError(
                    "total_steps=None: the schedule is left to the library, which needs the number of "
                    "optimizer steps; give attach(..., total_steps=...) or set total_step in "
                    "IncreLoraConfig."
                )
            total = 2**62
        if total < 1:
            raise ValueError(f"total_steps={total} must be 1 or more.")
        schedule = _core.Schedule(
            total,
            self._rank_array(),
            self._caps(),
            self.budget,
            tinit=config.tinit,
            deltaT=config.deltaT,
            top_h=config.top_h,
            add_r=config.add_r,
        )
        if schedule.reached < self.budget:
            warnings.warn(
                f"the budget cannot be reached: {len(self._modules)} modules at an average rank of "
                f"r={config.r} make {self.budget}, but from {self.total_rank} only "
                f"{schedule.reached} are reached in {total} steps with {schedule} and at most "
                f"{int(self._caps().sum())} by the modules' sizes and max_r. Train longer, raise "
                "top_h or add_r, lower deltaT or tinit, or lower r.",
                UserWarning,
                stacklevel=4,
            )
        return schedule

    def _start(self) -> None:
        self.schedule = self._plan()
        for module in self._modules:
            rank = module.layer.r[self._adapter]
            module.e_births = [0] * rank
            module.row_births = [0] * int(module.layer.lora_A[self._adapter].shape[0])
        self._adam_lead = self._adam_steps()
        self._update_may_grow()
        self._fill_reserves(self._modules)

    def _adam_steps(self) -> int:
        steps = self._optimizer.state.get(self._first.lora_A[self._adapter], {}).get("step", 0)
        return int(steps)

    def _caps(self) -> npt.NDArray[np.uint64]:
        most = self._config.max_r or 2**62
        caps = [
            max(min(most, module.layer.largest_rank), module.layer.r[self._adapter])
            for module in self._modules
        ]
        return np.array(caps, dtype=np.uint64)

    def _rank_array(self) -> npt.NDArray[np.uint64]:
        return np.array(list(self.ranks.values()), dtype=np.uint64)

    def _window_steps(self) -> int | None:
        window = self._config.importance_window
        if window == "auto":
            return _core.importance_window(self._config.beta1, self._config.beta2)
        return window

    def _normaliser(self, layer: Linear) -> float:
        size = float(layer.in_features * layer.out_features)
        return 1.0 / (size**0.5 if self._config.importance_norm == "sqrt" else size)

    def _parameters(self, module: _Module) -> list[tuple[nn.Parameter, int]]:
        """The module's parameters, each with the dimension along which it grows."""
        layer = module.layer
        return [
            (layer.lora_A[self._adapter], 0),
            (layer.lora_B[self._adapter], 1),
            (layer.lora_E[self._adapter], 0),
        ]

    def _factors(self) -> tuple[list[Tensor], list[Tensor]]:
        layers = [module.layer for module in self._modules]
        return (
            [layer.lora_A[self._adapter] for layer in layers],
            [layer.lora_B[self._adapter] for layer in layers],
        )

    # One step.

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._check_loaded()
        self.step += 1
        scale = self._loss_scale()
        if self._probe.importance is not None:
            factor = self._norm if scale is None else self._norm / scale
            _core.smooth_(
                self._importance,
                factor,
                self._mean,
                self._uncertainty,
                self._config.beta1,
                self._config.beta2,
            )
            self._importance.zero_()
        if self._config.orthogonality_weight > 0.0:
            self._regularise(getattr(optimizer, "grad_scale", None))
        if self._young:
            torch._foreach_copy_([old for _, old, _, _ in self._young], [p for p, *_ in self._young])

    def _after_step(self, *_: Any) -> None:
        self._observe_learning_rate()
        self._correct_rows()
        if self._may_grow and self.schedule.is_event(self.step):
            self._grow()
        self._arm()

    def _update_may_grow(self) -> None:
        room = bool((self._rank_array() < self._caps()).any())
        self._may_grow = room and self.total_rank < self.budget

    def _arm(self) -> None:
        """Asks the backward passes of the next step for the importance, if a growth will need it."""
        wanted = self._may_grow
        if wanted and self._window is not None:
            following = self.step + 1
            wanted = self.schedule.next_event(following) - following < self._window
        self._probe.importance = self._importance if wanted else None

    def _loss_scale(self) -> Tensor | float | None:
        if self._scaler is None or not self._scaler.is_enabled():
            return None
        scale: Tensor | float = self._scaler._get_scale_async()
        return scale if scale is not None else self._scaler.get_scale()

    def _regularise(self, grad_scale: Tensor | None) -> None:
        a, b = self._factors()
        used = [k for k in range(len(a)) if a[k].grad is not None and b[k].grad is not None]
        if not used:
            return
        # The mean is over all modules, whether or not they took part in this step.
        weight = self._config.orthogonality_weight * len(used) / len(a)
        factor = torch.tensor(weight, dtype=torch.float64, device=self._mean.device)
        if grad_scale is not None:
            factor = factor * grad_scale.to(factor)
        _core.add_orthogonality_gradient_(
            [a[k] for k in used],
            [b[k] for k in used],
            [a[k].grad for k in used],
            [b[k].grad for k in used],
            factor,
        )

    def _multiplier(self, group: dict[str, Any]) -> float:
        lr, initial = float(group["lr"]), float(group.get("initial_lr", group["lr"]))
        return lr / initial if initial > 0.0 else 0.0

    def _observe_learning_rate(self) -> None:
        total, warmup = self._total_steps, self._lr_warmup
        if self._lr_schedule != "auto" or not self._was_linear:
            return
        if total is None or total <= warmup:
            self._was_linear = False
        elif self.step > warmup:
            expected = (total - self.step) / (total - warmup)
            # A schedule may count the step it is at or the one before.
            tolerance = 1.5 / (total - warmup)
            self._was_linear = abs(self._multiplier(self._group) - expected) <= tolerance

    def _correct_rows(self) -> None:
        if not self._young:
            return
        linear = self._lr_schedule == "linear" or (self._lr_schedule == "auto" and self._was_linear)
        young = {id(p): (p, old, births, dim) for p, old, births, dim in self._young}
        for group in self._optimizer.param_groups:
            rows = [young[id(p)] for p in group["params"] if id(p) in young]
            if not rows:
                continue
            restart = self._config.restart_warmup
            _core.restart_(
                rows,
                self.step,
                multiplier=self._multiplier(group) if restart else None,
                lr_warmup=self._lr_warmup,
                linear_until=self._total_steps if linear else None,
                betas=_adam_betas(self._optimizer, group),
                adam_lead=self._adam_lead,
                decay=_decoupled_decay(self._optimizer, group),
            )

    # Growth.

    def _grow(self) -> None:
        scores = (self._mean * self._uncertainty).cpu().numpy()
        if not scores.any():
            warnings.warn(
                f"step {self.step}: the importance of every module is 0, so the first modules in model "
                "order grow. Did the adapter take part in the loss?",
                UserWarning,
                stacklevel=2,
            )
        chosen = self.schedule.choose(scores, self._rank_array(), self._caps(), self.budget)
        for k, components in chosen:
            module = self._modules[k]
            module.layer.grow(self._adapter, components, self._generator(k, "grow"))
            module.e_births += [self.step] * components
            self._follow(module)
            rank = module.layer.r[self._adapter]
            self._history.append((self.step, k, rank, float(scores[k])))
        self._update_may_grow()
        if self._may_grow:
            self._fill_reserves([self._modules[k] for k, _ in chosen])
        else:
            self._drop_reserves()
        self._config.rank_pattern = rank_pattern(self._model, self._adapter)
        self._find_young()
        logger.info(
            "step %d: %d modules grew, total rank %d of %d",
            self.step,
            len(chosen),
            self.total_rank,
            self.budget,
        )
        if not self._may_grow and self.total_rank < self.budget:
            warnings.warn(
                f"no module can grow any more, but the total rank is {self.total_rank} of a budget of "
                f"{self.budget}: every module is at max_r or at min(in, out).",
                UserWarning,
                stacklevel=2,
            )

    def _generator(self, module: int, purpose: str) -> torch.Generator:
        """The same numbers in every process and after a resume."""
        text = f"{self._seed}/{self.step}/{module}/{purpose}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
        return torch.Generator().manual_seed(seed)

    def _fill_reserves(self, modules: list[_Module]) -> None:
        if not self._config.uses_reserve or not self._may_grow:
            return
        caps = self._caps()
        for k, module in enumerate(self._modules):
            if module in modules:
                room = int(caps[k]) - module.layer.r[self._adapter]
                generator = self._generator(k, "reserve")
                module.layer.set_reserve(self._adapter, min(self.schedule.add_r, room), generator)
                self._follow(module)

    def _drop_reserves(self) -> None:
        for module in self._modules:
            if module.layer.reserve(self._adapter):
                module.layer.set_reserve(self._adapter, 0)
                self._follow(module)

    def _follow(self, module: _Module) -> None:
        """Brings births and optimizer state of a module in step with its parameters."""
        rows = int(module.layer.lora_A[self._adapter].shape[0])
        new = rows - len(module.row_births)
        module.row_births = module.row_births[:rows] + [self.step] * new
        for parameter, dim in self._parameters(module):
            resize_state(self._optimizer, parameter, dim)

    def _find_young(self) -> None:
        self._young = [
            (parameter, torch.empty_like(parameter, requires_grad=False), births, dim)
            for module in self._modules
            for (parameter, dim), births in zip(
                self._parameters(module),
                (module.row_births, module.row_births, module.e_births),
                strict=True,
            )
            if any(births)
        ]

    # State.

    def _write_state(self, *_: Any) -> None:
        schedule = self.schedule
        self._group[STATE_KEY] = {
            "version": _STATE_VERSION,
            "step": self.step,
            "seed": self._seed,
            "modules": list(self.ranks),
            "ranks": list(self.ranks.values()),
            "schedule": [schedule.tinit, schedule.deltaT, schedule.top_h, schedule.add_r],
            "adam_lead": self._adam_lead,
            "was_linear": self._was_linear,
            "mean": self._mean.clone(),
            "uncertainty": self._uncertainty.clone(),
            "importance": self._importance.clone(),
            "row_births": [list(module.row_births) for module in self._modules],
            "e_births": [list(module.e_births) for module in self._modules],
            "reserve": [self._reserve_of(module) for module in self._modules],
            "history": [list(row) for row in self._history],
        }

    def _reserve_of(self, module: _Module) -> list[Tensor]:
        rank = module.layer.r[self._adapter]
        a, b = module.layer.lora_A[self._adapter], module.layer.lora_B[self._adapter]
        return [a.detach()[rank:].clone(), b.detach()[:, rank:].clone()]

    def _after_load(self, *_: Any) -> None:
        if STATE_KEY in self._group:
            self._read_state()
            self._arm()
        else:
            warnings.warn(
                "optimizer: the loaded state holds none of an IncreLoRA scheduler; the scores start anew",
                UserWarning,
                stacklevel=2,
            )

    def _read_state(self) -> None:
        state = self._group.pop(STATE_KEY)
        if state["version"] != _STATE_VERSION:
            raise ValueError(
                f"optimizer: its IncreLoRA state has version {state['version']}, this release reads "
                f"{_STATE_VERSION}; resume with the release that saved it."
            )
        if state["modules"] != list(self.ranks):
            raise ValueError(
                f"optimizer: its IncreLoRA state is of {len(state['modules'])} modules, "
                f"{state['modules'][:1]} the first, but the model adapts {len(self._modules)}, "
                f"{list(self.ranks)[:1]} the first; resume with the model and target_modules that "
                "were trained."
            )
        self.step = state["step"]
        self.restored = True
        self._seed = state["seed"]
        tinit, interval, top_h, add_r = state["schedule"]
        self.schedule = _core.Schedule(
            self._total_steps or 2**62,
            self._rank_array(),
            self._caps(),
            self.budget,
            tinit=tinit,
            deltaT=interval,
            top_h=top_h,
            add_r=add_r,
        )
        self._adam_lead = state["adam_lead"]
        self._was_linear = state["was_linear"]
        self._mean.copy_(state["mean"])
        self._uncertainty.copy_(state["uncertainty"])
        self._importance.copy_(state["importance"])
        self._history = [tuple(row) for row in state["history"]]
        for k, module in enumerate(self._modules):
            module.row_births = list(state["row_births"][k])
            module.e_births = list(state["e_births"][k])
            rank = module.layer.r[self._adapter]
            if rank == state["ranks"][k] and not module.layer.reserve(self._adapter):
                module.layer.add_reserve(self._adapter, *state["reserve"][k])
        self._expected_ranks = state["ranks"]
        self._update_may_grow()

    def _check_loaded(self) -> None:
        """Before the first step after a resume: are the parameters those that the state is of?"""
        if self._expected_ranks is None:
            return
        for k, module in enumerate(self._modules):
            rank, expected = module.layer.r[self._adapter], self._expected_ranks[k]
            rows = int(module.layer.lora_A[self._adapter].shape[0])
            if rank != expected or rows != len(module.row_births):
                raise ValueError(
                    f"model: {module.name!r} has rank {rank} and {rows} rows, but the resumed optimizer "
                    f"state is of rank {expected} and {len(module.row_births)} rows; load the adapter "
                    "of the same checkpoint into the model before the optimizer's state."
                )
        self._expected_ranks = None
        self._update_may_grow()
        self._find_young()


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: a {type(optimizer).__name__} is not a torch.optim.Optimizer; give the "
            "optimizer that trains the adapter."
        )
    return optimizer


def _trainable_adapter(model: nn.Module, wanted: str | None) -> str:
    trainable: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, Linear):
            for name, factor in module.lora_A.items():
                if factor.requires_grad:
                    trainable[name] = None
    if wanted is not None:
        if wanted not in trainable:
            raise ValueError(
                f"adapter_name={wanted!r} is no trainable IncreLoRA adapter of the model; trainable "
                f"are {list(trainable)}."
            )
        return wanted
    if len(trainable) != 1:
        raise ValueError(
            f"model: it has {len(trainable)} trainable IncreLoRA adapters {list(trainable)}; ranks "
            "grow in exactly one: make it with get_peft_model(model, IncreLoraConfig(...)), or name "
            "it by adapter_name."
        )
    return next(iter(trainable))


def _adam_betas(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[float, float] | None:
    """Adam's betas, for the optimizers that correct the bias of their moments as Adam does."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        beta1, beta2 = group["betas"]
        return float(beta1), float(beta2)
    return None


def _decoupled_decay(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    return float(group["lr"]) * float(group.get("weight_decay", 0.0)) if decoupled else 0.0


__all__ = ["STATE_KEY", "IncreLoraConfig", "RankScheduler", "attach"]
