"""Checks of arguments: each failure names the argument, its value, and what would be right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def integer(name: str, value: Any, *, at_least: int, optional: bool = False) -> None:
    """Fails unless ``value`` is an integer of at least ``at_least``, or None where ``optional``."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} must be an integer, {at_least} or more.")
    if value < at_least:
        raise ValueError(f"{name}={value} is too small; it must be {at_least} or more.")


def number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float = float("inf"),
    at_most: float | None = None,
) -> None:
    """Fails unless ``value`` is a finite number within the bounds."""
    bounds = [f"at least {at_least}"] if at_least is not None else []
    bounds += [f"above {above}"] if above is not None else []
    if at_most is not None:
        bounds += [f"at most {at_most}"]
    else:
        bounds += [f"below {below}"] if below != float("inf") else ["finite"]
    want = " and ".join(bounds)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be a number, {want}.")
    value = float(value)
    low = at_least is not None and not value >= at_least
    high = at_most is not None and not value <= at_most
    if low or high or (above is not None and not value > above) or not value < below:
        raise ValueError(f"{name}={value} is out of range; it must be {want}.")


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Fails unless ``value`` is one of ``choices``, type included."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        raise ValueError(f"{name}={value!r} is unknown; it must be one of {list(choices)}.")


def positions(name: str, value: Sequence[int], count: int, of: str) -> list[int]:
    """``value`` as plain integers; fails unless they are positions among ``count``, ascending."""
    if not all(isinstance(item, Integral) and not isinstance(item, bool) for item in value):
        raise TypeError(f"{name}={value!r} must be integers, positions of {of}.")
    found = [int(item) for item in value]
    if not all(low < high for low, high in zip([-1, *found], [*found, count], strict=True)):
        raise ValueError(
            f"{name}={found} must be positions of the {count} {of}, from 0 to {count - 1}, each once and in "
            "ascending order."
        )
    return found


def collection(name: str, value: Any, kind: type, want: str) -> None:
    """Fails unless ``value`` is None or a collection of ``kind``; ``want`` says what it must be."""
    if value is None:
        return
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, kind) for item in value):
        raise TypeError(f"{name}={value!r} must be {want}.")


def pattern(name: str, value: Any) -> list[tuple[str, Any]]:
    """The items of a dictionary from module name (a regular expression) to value, or fails."""
    if not isinstance(value, dict):
        raise TypeError(f"{name}={value!r} must be a dictionary from module name to value.")
    for key in value:
        regex(name, key)
    return list(value.items())


def regex(name: str, value: Any) -> None:
    """Fails unless ``value`` is a regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{name}={value!r} is no regular expression of module names: {error}; put a backslash before "
            "characters that shall mean themselves."
        ) from error
