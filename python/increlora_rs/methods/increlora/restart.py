"""Restart warm-up: rows born during training follow a learning rate of their own (section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _core
from ...contract.policy import AdaptedModule, Plan, Step
from ...ops.device import stream
from ...resizing.optimizer_starts import adam_betas, weights_of
from ..learning_rate import decoupled_decay, multiplier


class RestartWarmup:
    """Corrects newborn rows after each optimizer step, for the learning rate's warm-up and for Adam's
    bias correction.

    Args:
        plan: The training: its optimizer, its steps, and its learning rate.
        enabled: Warm newborn rows up anew? Adam's bias correction is theirs in any case.

    Attributes:
        was_linear: Has the learning rate been a linear decay to 0 at the last step so far?
    """

    def __init__(self, plan: Plan, *, enabled: bool) -> None:
        self._optimizer, self._enabled = plan.optimizer, enabled
        self._total_steps, self._lr_warmup = plan.total_steps, plan.lr_warmup_steps
        self._lr_schedule = plan.lr_schedule
        # By parameter: it, and the weights that its optimizer moves along with it.
        self._young: dict[int, list[tuple[Tensor, list[int], int]]] = {}
        # Those of each group of the optimizer that has any, and the sizes of all groups then.
        self._newborns: list[tuple[int, torch.device, _core.Newborns]] = []
        self._sizes: list[int] = []
        self.was_linear = plan.total_steps is not None

    def find_young(self, modules: Sequence[AdaptedModule]) -> None:
        """Looks which parameters have rows that were born during training."""
        self._young = {
            id(held): [(values, births, dim) for values in (parameter, *weights_of(self._optimizer, held))]
            for module in modules
            if any(map(any, module.births))
            for held, (parameter, dim, births) in zip(module.trained, module.parameters, strict=True)
            if any(births)
        }
        self._sort_by_group()

    def _sort_by_group(self) -> None:
        groups = [group["params"] for group in self._optimizer.param_groups]
        self._sizes = [len(parameters) for parameters in groups]
        self._newborns = []
        for index, parameters in enumerate(groups):
            young = [one for parameter in parameters for one in self._young.get(id(parameter), ())]
            if young:
                self._newborns.append((index, young[0][0].device, _core.Newborns(young)))

    def keep_old(self) -> None:
        """Before the optimizer acts: keeps the values of the rows concerned."""
        if self._young and self._sizes != [len(group["params"]) for group in self._optimizer.param_groups]:
            self._sort_by_group()
        for _, device, newborns in self._newborns:
            newborns.keep(stream(device))

    def correct(self, step: Step) -> None:
        """After the optimizer took the step: corrects the newborn rows."""
        self._observe(step)
        linear = self._lr_schedule == "linear" or (self._lr_schedule == "auto" and self.was_linear)
        for index, device, newborns in self._newborns:
            group = self._optimizer.param_groups[index]
            newborns.correct(
                step.number,
                multiplier=multiplier(group) if self._enabled else None,
                lr_warmup=self._lr_warmup,
                linear_until=self._total_steps if linear else None,
                betas=adam_betas(self._optimizer, group),
                adam_lead=step.lead,
                decay=decoupled_decay(self._optimizer, group),
                stream=stream(device),
            )

    def _observe(self, at: Step) -> None:
        """Has the learning rate been a linear decay to 0 at ``total_steps`` so far?"""
        step, total, warmup = at.number, self._total_steps, self._lr_warmup
        if self._lr_schedule != "auto" or not self.was_linear or total is None or step <= warmup:
            return
        expected = (total - step) / (total - warmup) if total > warmup else 1.0
        # A schedule may count the step that it is at, or the one before, and overflowed ones or not.
        behind = expected - multiplier(self._optimizer.param_groups[0])
        one = 1.0 / max(total - warmup, 1)
        tolerance = 1.5 * one + 0.01
        self.was_linear = -tolerance <= behind <= tolerance + at.skipped * one
