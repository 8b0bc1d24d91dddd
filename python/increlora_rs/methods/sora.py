"""SoRA (arXiv 2311.11696): a gate a component, pushed to exact zeros by a proximal step after every update.

``dW = s B diag(g) A`` with ``s = lora_alpha / r`` and r the rank at the start. What is left at the end, the
components whose gate is not 0, is a plain LoRA with a rank of its own in every module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import _core
from ..contract.config import WITH_DORA, MethodConfig
from ..contract.method import Method
from ..contract.policy import AdaptedModule, Event, Plan, Policy, Step
from ..support import arguments
from .components import FixedComponents
from .learning_rate import decoupled_decay, initial_lr, is_decoupled, multiplier

_SCHEDULES = ("linear", "log_linear", "exp_linear")


@dataclass
class SoraConfig(MethodConfig):
    """Configuration of SoRA (arXiv 2311.11696), in place of ``peft.LoraConfig``.

    The names of its options are those of the authors' code. It needs ``IncreLoraCallback`` or ``attach``,
    which take the proximal step.

    Args:
        r: Rank of every module at the start; what is left of it is the number of gates that are not 0.
        lora_alpha: The scale is ``lora_alpha / r`` at all times; with ``use_rslora=True`` over the root of r.
        sparse_lambda: Weight of the L1 term, ``sparse_lambda * sum |g| / (number of gates in all)``. Its
            gradient is added after clipping, and its value is in no loss.
        sparse_lambda_2: The threshold xi of the proximal step, 0 or more. It is taken off in every step
            whatever the learning rate, so how many gates become 0 depends on the number of steps.
        prox: "soft": ``sign(g) max(|g| - xi, 0)``. "official": as the authors' code has it, where what is
            less than xi after that becomes 0, too, so that no gate is left between 0 and xi.
        threshold_times_lr: Multiply xi by the gates' learning rate of the step, as a second optimizer of the
            authors' code does: the number of steps then matters less.
        sparse_lr: Learning rate of the gates before any schedule, which they follow; None: that of their
            group in the optimizer. Weight decay does not touch them.
        lambda_schedule: Lets xi rise from ``sparse_lambda_2`` to ``max_lambda`` in ``lambda_num`` values,
            each for an equal part of the training. "linear": evenly. "log_linear": the logarithms of even
            steps between the exponentials. "exp_linear": the exponentials of even steps between the
            logarithms. None: xi stays.
        max_lambda: The last value of xi; only with ``lambda_schedule``.
        lambda_num: Number of values, 2 or more; likewise.
        init_lora_weights: True: LoRA's own, B 0; "gaussian": the same with A ~ N(0, 1 / r^2); False: A and B
            random, so that a fresh adapter is not the identity (for tests). The gates are N(0, 1) in each.

    The other arguments are LoraConfig's: ``target_modules``, ``lora_dropout``, ``bias``, ``use_rslora``,
    ``modules_to_save``, ``trainable_token_indices``, ``exclude_modules``, ``layers_to_transform``,
    ``layers_pattern``, ``rank_pattern``, ``alpha_pattern``, ``use_dora``, ``fan_in_fan_out`` (set by itself
    where it is needed), ``task_type``, ``inference_mode``.

    Raises:
        ValueError: an argument has a wrong value, or is an option of LoraConfig that is not supported; the
            message names it.
        TypeError: an argument has a wrong type.
    """

    supported: ClassVar[frozenset[str]] = WITH_DORA
    inits: ClassVar[tuple[Any, ...]] = (True, False, "gaussian")

    lora_alpha: int = field(default=16, metadata={"help": "The scale is lora_alpha / r."})
    sparse_lambda: float = field(default=1e-3, metadata={"help": "Weight of the L1 term of the gates."})
    sparse_lambda_2: float = field(default=1e-3, metadata={"help": "Threshold xi of the proximal step."})
    prox: Literal["soft", "official"] = field(
        default="soft", metadata={"help": "Soft thresholding, or the authors' operator."}
    )
    threshold_times_lr: bool = field(default=False, metadata={"help": "Multiply xi by the learning rate."})
    sparse_lr: float | None = field(default=None, metadata={"help": "Learning rate of the gates."})
    lambda_schedule: Literal["linear", "log_linear", "exp_linear"] | None = field(
        default=None, metadata={"help": "How xi rises during the training."}
    )
    max_lambda: float = field(default=10.0, metadata={"help": "The last value of xi."})
    lambda_num: int = field(default=10, metadata={"help": "Number of values of xi."})
    init_lora_weights: bool | Literal["gaussian"] = field(
        default=True, metadata={"help": "True or 'gaussian' (LoRA's) or False.", "lora_variants": ()}
    )

    def check(self) -> None:
        """Checks the thresholds, the learning rate and the schedule."""
        arguments.number("sparse_lambda", self.sparse_lambda, at_least=0.0)
        arguments.number("sparse_lambda_2", self.sparse_lambda_2, at_least=0.0)
        arguments.choice("prox", self.prox, ("soft", "official"))
        arguments.choice("threshold_times_lr", self.threshold_times_lr, (True, False))
        if self.sparse_lr is not None:
            arguments.number("sparse_lr", self.sparse_lr, at_least=0.0)
        arguments.choice("lambda_schedule", self.lambda_schedule, (*_SCHEDULES, None))
        arguments.number("max_lambda", self.max_lambda, at_least=0.0)
        arguments.integer("lambda_num", self.lambda_num, at_least=2)
        if self.lambda_schedule is None:
            return
        if self.max_lambda < self.sparse_lambda_2:
            raise ValueError(
                f"max_lambda={self.max_lambda} is below sparse_lambda_2={self.sparse_lambda_2}, and xi only "
                "rises; raise max_lambda, or leave lambda_schedule out."
            )
        if self.lambda_schedule == "exp_linear" and self.sparse_lambda_2 == 0.0:
            raise ValueError(
                "sparse_lambda_2=0.0 has no logarithm, of which lambda_schedule='exp_linear' takes even "
                "steps; give a value above 0, or take lambda_schedule='linear'."
            )
        if self.lambda_schedule == "log_linear" and self.max_lambda > math.log(np.finfo(float).max):
            raise ValueError(
                f"max_lambda={self.max_lambda} has no exponential, of which lambda_schedule='log_linear' "
                "takes even steps; give less, or take lambda_schedule='linear'."
            )

    def thresholds(self) -> list[float]:
        """The values of xi, one after the other."""
        first, last, count = self.sparse_lambda_2, self.max_lambda, self.lambda_num
        if self.lambda_schedule is None:
            return [first]
        if self.lambda_schedule == "linear":
            values = np.linspace(first, last, count)
        elif self.lambda_schedule == "log_linear":
            values = np.log(np.linspace(np.exp(first), np.exp(last), count))
        else:
            values = np.exp(np.linspace(np.log(first), np.log(last), count))
        return [float(value) for value in values]


class Gated(FixedComponents):
    """Components of which E is the gate; none comes or goes while they are trained."""

    def draw(
        self, site: Any, rank: int, config: SoraConfig, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """LoRA's initialisation of A and B, and gates from N(0, 1)."""
        drawn = super().draw(site, rank, config, generator)
        drawn["lora_E"].normal_(generator=generator)
        return drawn

    def acting(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The components whose gate is not 0; one where all are, for no LoRA has rank 0."""
        a, b, gate = (parameters[name] for name in self.names)
        open_ = torch.nonzero(gate.flatten()).flatten()
        kept = open_ if len(open_) else torch.zeros(1, dtype=torch.int64, device=gate.device)
        return {"lora_A": a[kept], "lora_B": b[:, kept], "lora_E": gate[kept]}


class Gates(Policy):
    """An L1 term before, and a proximal step after every update, on all gates at once.

    Args:
        modules, config, plan: As for :class:`Policy`.

    Raises:
        ValueError: the number of steps is not known but needed.
    """

    def __init__(self, modules: Sequence[AdaptedModule], config: SoraConfig, plan: Plan) -> None:
        super().__init__(modules, config, plan)
        self._gates: list[Tensor] = [module.factors[-1] for module in modules]
        self._thresholds = config.thresholds()
        if len(self._thresholds) > 1 and plan.total_steps is None:
            raise ValueError(
                f"total_steps=None: lambda_schedule={config.lambda_schedule!r} divides the training among "
                f"{config.lambda_num} values of xi, which needs the number of optimizer steps; give "
                "attach(..., total_steps=...)."
            )
        # Of the training that the schedule was made for, which a resumed one may be longer than.
        self._total_steps = plan.total_steps
        # The gates of each group of the optimizer that has any, and the sizes of all groups then.
        self._groups: list[tuple[int, list[Tensor]]] = []
        self._sizes: list[int] = []
        self._kept: dict[int, list[Tensor]] = {}

    def threshold(self, number: int) -> float:
        """xi at step ``number``, before a learning rate is put to it."""
        total, count = self._total_steps, len(self._thresholds)
        if count == 1 or total is None:
            return self._thresholds[0]
        return self._thresholds[min((number - 1) * count // total, count - 1)]

    def before_step(self, step: Step) -> None:
        """Adds the L1 term's gradient; takes a weight decay that goes through the gradient off it."""
        if self.config.sparse_lambda > 0.0:
            gradients = [gate.grad for gate in self._gates]
            weight, scale = self.config.sparse_lambda, step.grad_scale
            _core.add_l1_(self._gates, gradients, weight, grad_scale=scale)
        optimizer = self.plan.optimizer
        self._kept = {}
        for index, gates in self._by_group():
            group = optimizer.param_groups[index]
            decay = float(group.get("weight_decay", 0.0))
            if decay > 0.0 and not is_decoupled(optimizer, group):
                _take_off(gates, decay, step.grad_scale)
            if self._ratio(group) != 1.0 or decoupled_decay(optimizer, group) > 0.0:
                self._kept[index] = list(torch._foreach_mul(gates, 1.0))

    def after_step(self, step: Step) -> Event | None:
        """Gives the gates' update their own learning rate and no decay; then the proximal step."""
        optimizer, xi = self.plan.optimizer, self.threshold(step.number)
        official = self.config.prox == "official"
        for index, gates in self._by_group():
            group = optimizer.param_groups[index]
            ratio = self._ratio(group)
            if index in self._kept:
                # g = old + ratio (new - (1 - decay) old)
                of_old = 1.0 - ratio * (1.0 - decoupled_decay(optimizer, group))
                torch._foreach_mul_(gates, ratio)
                torch._foreach_add_(gates, self._kept[index], alpha=of_old)
            lr = ratio * initial_lr(group) * multiplier(group)
            _core.shrink_gates_(gates, xi * lr if self.config.threshold_times_lr else xi, official=official)
        self._kept = {}
        return None

    def _ratio(self, group: dict[str, Any]) -> float:
        """The gates' learning rate as a multiple of their group's."""
        own, of_group = self.config.sparse_lr, initial_lr(group)
        return 1.0 if own is None or of_group == 0.0 else own / of_group

    def _by_group(self) -> list[tuple[int, list[Tensor]]]:
        groups = [group["params"] for group in self.plan.optimizer.param_groups]
        sizes = [len(parameters) for parameters in groups]
        if sizes != self._sizes:
            ours = {id(gate) for gate in self._gates}
            self._sizes = sizes
            found = [[p for p in parameters if id(p) in ours] for parameters in groups]
            self._groups = [(index, gates) for index, gates in enumerate(found) if gates]
        return self._groups

    def ranks(self) -> list[int]:
        """The gates of every module that are not 0."""
        return [int(count) for count in torch.stack([torch.count_nonzero(gate) for gate in self._gates])]

    def scores(self) -> npt.NDArray[np.float64]:
        """``sum |g|`` of every module."""
        sums = torch.stack([gate.detach().double().abs().sum() for gate in self._gates])
        scores: npt.NDArray[np.float64] = sums.cpu().numpy()
        return scores

    def logs(self) -> dict[str, float]:
        """The part of the gates that are 0."""
        return {"closed_gates": 1.0 - sum(self.ranks()) / sum(gate.numel() for gate in self._gates)}

    def state_dict(self) -> dict[str, Any]:
        """The number of steps that xi's schedule is made for."""
        return {"total_steps": self._total_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on by the schedule of the run that is resumed."""
        self._total_steps = state.get("total_steps", self._total_steps)


def _take_off(gates: list[Tensor], decay: float, scale: Tensor | None) -> None:
    """Takes off the gradients what the optimizer will add to them as weight decay."""
    for gate in gates:
        if gate.grad is not None:
            gate.grad.sub_(gate.detach() * (decay if scale is None else decay * scale))


METHOD = Method(
    name="sora",
    title="SoRA",
    config=SoraConfig,
    structure=Gated(),
    policy=Gates,
    summary="A LoRA whose gates were pushed to 0 during training where they did not pay",
    paper="https://arxiv.org/abs/2311.11696",
)
