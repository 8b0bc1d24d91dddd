"""Modules that no gradient reaches: told by name, and given nothing while others have room."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ... import _core
from ...contract.policy import AdaptedModule
from ...resizing.cut import here
from ...support.warning import warn

# So many names stand in the warning.
_NAMED = 8


def choose(
    schedule: _core.Schedule,
    scores: npt.NDArray[np.float64],
    ranks: npt.NDArray[np.uint64],
    caps: npt.NDArray[np.uint64],
    budget: int,
    reached: npt.NDArray[np.bool_],
) -> list[tuple[int, int]]:
    """As ``schedule.choose``, but what it gives to modules without a gradient goes to the others, best
    first, as far as they have room and the budget pays for it.

    The event hands out as many components as it would have, so that the budget is met when the schedule
    says: where the others are full, what is left goes to those without a gradient after all.
    """
    chosen = schedule.choose(scores, ranks, caps, budget)
    if all(reached[k] for k, _ in chosen) or not reached.any():
        return chosen
    left = sum(components for _, components in chosen)
    gained: dict[int, int] = {}
    now = ranks.copy()
    for limits in (np.where(reached, caps, ranks), caps):
        while left > 0 and (more := schedule.choose(scores, now, np.maximum(limits, now), budget)):
            for k, components in more:
                given = min(components, left)
                if given > 0:
                    gained[k] = gained.get(k, 0) + given
                    now[k] += np.uint64(given)
                    left -= given
    return list(gained.items())


def tell(step: int, modules: Sequence[AdaptedModule], reached: npt.NDArray[np.bool_]) -> None:
    """Names the modules without a gradient, if others have one."""
    without = [module.name for module, has in zip(modules, reached, strict=True) if not has]
    if not without or len(without) == len(modules):
        return
    more = "" if len(without) <= _NAMED else f" and {len(without) - _NAMED} more"
    warn(
        f"step {step}: no gradient has reached {len(without)} of {len(modules)} adapted modules, "
        f"{without[:_NAMED]}{more}: they are not called, something reads their weight without calling them, "
        "or the loss does not depend on them. They get no rank while others have room; if that is to stay "
        "so, leave them out of target_modules"
    )


def has_learned(module: AdaptedModule, optimizer: torch.optim.Optimizer) -> bool:
    """Did a gradient reach the factor through which a new adapter's update is 0?

    The importance of such an update is 0 by itself, as long as its learning rate is. Other factors prove
    nothing: a regulariser and weight decay move them without a loss.
    """
    for parameter in module.first_learners():
        state = optimizer.state.get(parameter, {}).values()
        # Of what an engine has laid out otherwise the optimizer has a piece.
        piece = getattr(optimizer, "piece_of", torch.Tensor.detach)(parameter)
        moments = [value for value in state if isinstance(value, torch.Tensor) and value.shape == piece.shape]
        seen = moments if parameter.grad is None else [parameter.grad, *moments]
        if any(bool(here(value).any()) for value in seen):
            return True
    return False
