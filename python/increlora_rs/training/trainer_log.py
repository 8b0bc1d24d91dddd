"""Who hears the log of ``transformers.Trainer`` before whom.

Trainer calls its callbacks in turn: its own, the reporting integrations (TensorBoard, Weights & Biases and
others), those of the user, and last what prints to the console. All of them get one dictionary.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler


class _Discreet(TrainerCallback):
    """Takes the scalars of single modules out of the log again, before it is printed: they are hundreds, for
    charts and not for the console."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        for name in [name for name in logs if name.startswith(self._prefix)]:
            del logs[name]


def speak_first(callback: TrainerCallback, by_module: str) -> None:
    """Moves ``callback`` before every other that listens to the log, so that what it adds reaches them;
    what it adds about single modules, under names that begin with ``by_module``, does not reach the console.
    To be called from one of its hooks."""
    handler = _calling_handler(callback)
    if handler is None:
        return
    others = [
        other for other in handler.callbacks if other is not callback and not isinstance(other, _Discreet)
    ]
    listening = (n for n, other in enumerate(others) if _overrides_on_log(other))
    others.insert(next(listening, len(others)), callback)
    printing = (n for n, other in enumerate(others) if isinstance(other, (PrinterCallback, ProgressCallback)))
    others.insert(next(printing, len(others)), _Discreet(by_module))
    # A new list: the handler is going through the old one.
    handler.callbacks = others


def _calling_handler(callback: TrainerCallback) -> Any:
    """Trainer's handler of callbacks, up the stack: no hook is told of it."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler) and any(other is callback for other in caller.callbacks):
            return caller
        frame = frame.f_back
    return None


def _overrides_on_log(callback: TrainerCallback) -> bool:
    return type(callback).on_log is not TrainerCallback.on_log
