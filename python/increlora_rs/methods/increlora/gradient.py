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
from ...ops.update import LowRank
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
        self._sums: list[tuple[Tensor, Tensor]] = []
        self._psis: list[Tensor] = []
        self._idle = Idle(modules)

    def start(self, seed: int, components: int) -> None:
        """Draws the sketches' random matrices, the same for the same seed; the sketches become 0."""
        k = _OVERSAMPLING + components
        self._components = components
        self.gauge.draw((k, _ROWS_A_COLUMN * k + 1), seed)
        self._steps = torch.zeros(1, dtype=torch.float64, device=self._device)
        self._sums = self.gauge.pairs(self.gauge.sum)
        self._psis = [self.gauge.given(k)[1] for k in range(len(self._modules))]
        # One number of each module's sum: where it is not 0, nothing else need be looked at.
        places = [left.storage_offset() for left, _ in self._sums]
        self._firsts = torch.tensor(places, dtype=torch.int64, device=self._device)
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
        if not self._idle:
            self.gauge.take_(self._steps, scale=scale, found_inf=step.found_inf)
            return
        # Asking for it leaves there what this step added alone.
        assert len(self.gauge.total)
        took_part, steps = self._idle.in_gauge(self._parts), self._steps.clone()
        self.gauge.take_(self._steps, scale=scale, found_inf=step.found_inf)
        # A step that is not finite is none.
        self._took_part += took_part * (self._steps - steps)

    def reached(self, optimizer: torch.optim.Optimizer) -> npt.NDArray[np.bool_]:
        """Which modules a gradient has reached since the last growth, in the window's steps."""
        held = (self.gauge.sum[self._firsts] != 0.0).cpu()
        for k in torch.nonzero(~held).flatten().tolist():
            left, right = self._sums[k]
            held[k] = left.any() | right.any()
        return in_any_process(held, self._device)

    def at_growth(self) -> npt.NDArray[np.float64]:
        """The scores for a growth, the same in every process."""
        steps = (self._took_part if self._idle else self._steps).clamp(min=1.0)
        factors = [self._factors(module) for module in self._modules]
        sums = self.gauge.pairs(self.gauge.sum)
        sigma = _core.sketch_scores(sums, self._psis, factors).to(steps.device) / steps
        from_first_(sigma)
        self._sigma = sigma.cpu().numpy()
        return self._sigma

    def after_growth(self) -> None:
        """The sketches start anew."""
        self.gauge.sum.zero_()
        self._steps.zero_()
        self._took_part.zero_()

    def _factors(self, module: AdaptedModule) -> tuple[Tensor, Tensor]:
        """A and B of the active components."""
        layer, tensors = module.layer, dict(zip(module.structure.names, module.factors, strict=True))
        if module.factors[0].is_meta:
            tensors = layer.present(module.adapter)
        update: LowRank = module.structure.update(
            tensors, layer.site, layer.configs[module.adapter], 1.0, training=False
        )
        return update.a.detach(), update.b.detach()

    def directions(self, k: int, components: int) -> tuple[Tensor, Tensor] | None:
        """Unit vectors for new components of module ``k``, as columns (out, n) of B and rows (n, in) of A,
        signed so that a positive E lowers the loss; n may be less than ``components``.

        Between :meth:`at_growth` and :meth:`after_growth`, and before the module grows; None where new
        components start from random numbers.
        """
        if not self._keeps_directions:
            return None
        factors = self._factors(self._modules[k])
        found = _core.sketched_triples(*self._sums[k], self._psis[k], *factors, self._components)
        sigma, u, v = (part.to(self._device) for part in found)
        for part in (sigma, u, v):
            from_first_(part)
        n = min(components, int((sigma > 0.0).sum()))
        return -u[:, :n], v[:n]

    def values(self) -> npt.NDArray[np.float64]:
        """sigma of every module as of the last growth; 0 before the first."""
        return self._sigma.copy()

    def state(self) -> dict[str, Any]:
        """Copies for a checkpoint; of the sketches' sum if it holds anything."""
        held = {"sum": self.gauge.sum.clone()} if bool(self.gauge.sum.any()) else {}
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
            self.gauge.sum.copy_(saved["sum"])

    def finish(self) -> None:
        """Gives the sketches' memory back."""
        self.gauge.clear()
        self._sums, self._psis, self._parts = [], [], []
