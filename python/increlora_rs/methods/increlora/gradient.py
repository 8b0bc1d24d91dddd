"""``importance="gradient"``: what a new component would gain, from a sketch of each gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ... import _core
from ...contract.policy import AdaptedModule, Step
from ...gauges import Sketches
from ...training.distributed import from_first_, in_any_process
from .config import IncreLoraConfig
from .idle import Idle
from .scores import Scores

# Columns of G Omega beyond the components that a growth may ask for.
_OVERSAMPLING = 7
# Rows of Psi G for each column. With 2, where singular values fall off slowly, the error of the
# reconstruction makes scores twice as high and twice as uneven as with 4.
_ROWS_A_COLUMN = 4


class GradientScores(Scores):
    """A module's score is sigma, the largest singular value of ``(1 - P_B) G (1 - P_A)``.

    G (out, in) is the gradient of the module's weight, the mean over the steps since the last growth, those
    of the window at most, of an expert those in which a token came to it; P_B and P_A project on the columns
    of B and the rows of A of its active components.
    What is projected off is what those can still learn by themselves, for ``B dA + dB A`` has no part outside
    the two spans. Of all new components ``dW = t u v^T``, u and v unit vectors, the one with the singular
    vectors of sigma lowers the loss fastest, to first order by sigma for each unit of t. So sigma is in units
    of the loss for one component, whatever the module's size, and ``importance_norm`` has no part in it;
    ``budget_unit="parameters"`` divides it by the component's cost.

    The smoothing with beta1 and beta2 does not apply: the mean over the window takes its place.

    Memory: two sketches of ``k out + l in`` numbers a module, float32 (float64 for float64 adapters), k = 7
    and the components of one growth, l = 4 k + 1; each step of the window averages one over the processes.

    Reading sigma from a sketch is exact for a G of rank k. It errs by a few per cent where singular values
    fall off as 1 / j, and is too high by up to a half where G is next to noise.

    Args:
        modules, config: As for :class:`Scores`.
    """

    def __init__(self, modules: Sequence[AdaptedModule], config: IncreLoraConfig) -> None:
        super().__init__(modules, config)
        self._keeps_directions = config.follows_gradient
        self._sigma = np.zeros(len(modules))
        wide = torch.promote_types(modules[0].factors[0].dtype, torch.float32)
        sizes = [(module.layer.out_features, module.layer.in_features) for module in modules]
        # One object for ever: the layers know it.
        self.gauge: Sketches = Sketches(torch.zeros(0, dtype=wide, device=self._device), sizes)
        self._directions: list[tuple[Tensor, Tensor, Tensor]] = []
        self._idle = Idle(modules)

    def start(self, seed: int, components: int) -> None:
        """Draws the sketches' random matrices, the same for the same seed; the sketches become 0."""
        k = _OVERSAMPLING + components
        self._components = components
        self.gauge.draw((k, _ROWS_A_COLUMN * k + 1), seed)
        self._sum = torch.zeros_like(self.gauge.total)
        self._steps = torch.zeros(1, dtype=torch.float64, device=self._device)
        self._sums = self.gauge.pairs(self._sum)
        # Of the modules that may be idle: the steps that each took part in, and where these add to.
        self._took_part = torch.zeros(len(self._modules), dtype=torch.float64, device=self._device)
        pairs = self.gauge.pairs(self.gauge.total) if self._idle else []
        self._parts = [pairs[k][0] for k in self._idle.may_be]
        self._sigma = np.zeros(len(self._modules))

    def before_smoothing(self, step: Step) -> None:
        """Nothing is smoothed."""

    def before_step(self, step: Step) -> None:
        """Takes the step's sketches into their sum; one that is not finite is left out."""
        if not step.armed:
            return
        scale, loss_scale = step.grad_scale, step.loss_scale
        if loss_scale is not None:
            scale = torch.tensor(loss_scale, dtype=torch.float64)
        before = self._idle and (self._idle.in_gauge(self._parts), self._steps.clone())
        _core.take_sketches_(self.gauge.total, self._sum, self._steps, scale=scale, found_inf=step.found_inf)
        if before:
            took_part, steps = before
            # A step that is not finite is none.
            self._took_part += took_part * (self._steps - steps)

    def reached(self, optimizer: torch.optim.Optimizer) -> npt.NDArray[np.bool_]:
        """Which modules a gradient has reached since the last growth, in the window's steps."""
        held = torch.stack([left.any() | right.any() for left, right in self._sums])
        return in_any_process(held.cpu(), self._device)

    def at_growth(self) -> npt.NDArray[np.float64]:
        """The scores for a growth, the same in every process; the sketches start anew."""
        count = self._components if self._keeps_directions else 1
        found = [self._triples(k, count) for k in range(len(self._modules))]
        steps = (self._took_part if self._idle else self._steps).clamp(min=1.0)
        sigma = torch.stack([values[0] for values, _, _ in found]).to(steps.device) / steps
        from_first_(sigma)
        self._sigma = sigma.cpu().numpy()
        self._directions = found if self._keeps_directions else []
        self._sum.zero_()
        self._steps.zero_()
        self._took_part.zero_()
        return self._sigma

    def _triples(self, k: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        module = self._modules[k]
        update: Any = module.layer.update(module.adapter)
        a, b = update.a.detach(), update.b.detach()
        return _core.sketched_triples(*self._sums[k], self.gauge.given(k)[1], a, b, count)

    def directions(self, k: int, components: int) -> tuple[Tensor, Tensor] | None:
        """Unit vectors for new components of module ``k``, as columns (out, n) of B and rows (n, in) of A,
        signed so that a positive E lowers the loss; n may be less than ``components``.

        After :meth:`at_growth`; None where new components start from random numbers.
        """
        if not self._directions:
            return None
        sigma, u, v = (part.to(self._device) for part in self._directions[k])
        for part in (sigma, u, v):
            from_first_(part)
        n = min(components, int((sigma > 0.0).sum()))
        return -u[:, :n], v[:n]

    def values(self) -> npt.NDArray[np.float64]:
        """sigma of every module as of the last growth; 0 before the first."""
        return self._sigma.copy()

    def state(self) -> dict[str, Any]:
        """Copies for a checkpoint; of the sketches' sum if it holds anything."""
        held = {"sum": self._sum.clone()} if bool(self._sum.any()) else {}
        if self._idle:
            held["took_part"] = self._took_part.clone()
        return {"sigma": self._sigma.tolist(), "steps": self._steps.clone(), **held}

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave."""
        self._sigma = np.array(saved["sigma"])
        self._steps.copy_(saved["steps"])
        if "took_part" in saved:
            self._took_part.copy_(saved["took_part"])
        if "sum" in saved:
            self._sum.copy_(saved["sum"])

    def finish(self) -> None:
        """Gives the sketches' memory back."""
        self.gauge.clear()
        self._sums, self._directions, self._parts = [], [], []
        self._sum = self._sum.new_zeros(0)
