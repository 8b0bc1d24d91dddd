"""Warnings that point to the user's own line."""

from __future__ import annotations

import sys
import warnings

# What stands between a user's script and this package: torch calls hooks, and Trainer callbacks.
_BETWEEN = frozenset({__name__.partition(".")[0], "torch", "accelerate", "peft", "transformers"})


def warn(message: str) -> None:
    """A ``UserWarning`` at the innermost line of the stack that is of no library in between.

    In a thread that autograd runs there is none: then it points to the outermost line.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )
