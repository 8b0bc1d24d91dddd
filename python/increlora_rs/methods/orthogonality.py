"""The regulariser of IncreLoRA (eq. 4) and AdaLoRA, for orthonormal rows of A and columns of B: the mean over
all A and B of ``||A A^T - I||_F`` and ``||B^T B - I||_F``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _core
from ..contract.policy import AdaptedModule, Step
from ..ops.device import stream
from .smoothing import Smoothing


class Orthogonality:
    """The regulariser's gradient, added to the parameters' own before each update.

    Args:
        modules: The adapted modules; their A and B may change their size in place.
        weight: What the regulariser is multiplied by; with 0 nothing is added.
        smoothing: What is smoothed in the same call, for all of a step's Rust is one call; None: nothing.
    """

    def __init__(
        self, modules: Sequence[AdaptedModule], weight: float, smoothing: Smoothing | None = None
    ) -> None:
        self._weight, self._smoothing = weight, smoothing
        self._device = modules[0].factors[0].device
        unused = Smoothing(torch.zeros(len(modules), dtype=torch.float64, device=self._device), 0.0, 0.0)
        vectors = unused if smoothing is None else smoothing
        self._plan = _core.StepPlan(
            [module.factors[0] for module in modules],
            [module.factors[1] for module in modules],
            vectors.total,
            vectors.factor,
            vectors.mean,
            vectors.uncertainty,
            vectors.beta1,
            vectors.beta2,
        )

    def before_step(self, step: Step) -> None:
        """Adds the gradient, multiplied as the others are; takes the step's importances in."""
        smooth = step.armed and self._smoothing is not None
        if not smooth and self._weight == 0.0:
            return
        self._plan.take_gradients_(
            smooth=smooth,
            weight=self._weight,
            loss_scale=step.loss_scale if smooth else None,
            grad_scale=step.grad_scale,
            found_inf=step.found_inf,
            stream=stream(self._device),
        )

    def value(self) -> Tensor:
        """The regulariser now, without its weight: a float64 scalar."""
        return self._plan.orthogonality()
