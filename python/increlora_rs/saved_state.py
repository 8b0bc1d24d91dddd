"""The scheduler's part of an optimizer's checkpoint: where it lies, and does it fit the training at hand?"""

from __future__ import annotations

import warnings
from typing import Any

from .budget import Budget, amount
from .config import IncreLoraConfig

# Key in the optimizer's first parameter group: there the state travels with every checkpoint of the
# optimizer, and is found whether it is loaded before or after `attach`.
KEY = "increlora"
VERSION = 1


def check(
    saved: dict[str, Any],
    modules: list[str],
    config: IncreLoraConfig,
    total_steps: int | None,
    budget: Budget,
) -> None:
    """Tells what of a saved state differs from the training that resumes it.

    Args:
        modules: Full names, in model order.

    Raises:
        ValueError: another release saved it, or it is of other modules.
    """
    if saved["version"] != VERSION:
        raise ValueError(
            f"optimizer: its IncreLoRA state has version {saved['version']}, this release reads "
            f"{VERSION}; resume with the release that saved it."
        )
    if saved["modules"] != modules:
        raise ValueError(
            f"optimizer: its IncreLoRA state is of {len(saved['modules'])} modules, "
            f"{saved['modules'][:1]} the first, but the model adapts {len(modules)}, "
            f"{modules[:1]} the first; resume with the model and target_modules that were trained."
        )
    if saved["total_steps"] != total_steps:
        _warn(
            f"total_steps={total_steps}, but the run that is resumed was planned for "
            f"{saved['total_steps']}: ranks go on growing by that plan, {budget} in total"
        )
    planned = saved["budget"], saved.get("budget_unit", "rank")
    if planned != (budget.total, budget.unit):
        _warn(
            f"r={config.r} makes a budget of {budget}, but the run that is resumed was planned for "
            f"{amount(*planned)}: ranks go on growing by that plan, which may not reach it"
        )
    wanted = config.tinit, config.deltaT, config.top_h
    for name, value, had in zip(("tinit", "deltaT", "top_h"), wanted, saved["schedule"], strict=False):
        if value is not None and value != had:
            _warn(
                f"{name}={value}, but the run that is resumed was planned with {had}: ranks go on growing by "
                "that plan"
            )
    # Releases before there was a choice saved none.
    kind = saved.get("importance", "sensitivity")
    if kind != config.importance:
        _warn(
            f"importance={config.importance!r}, but the run that is resumed had {kind!r}: the scores start "
            f"anew. Set importance={kind!r} to go on as before."
        )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
