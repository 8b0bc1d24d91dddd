"""The loss scaler of a float16 training: which steps it skips, and what it multiplies the loss by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..support.untraced import untraced


class ScalerWatch:
    """Notices the steps that a ``GradScaler`` skips, for it then does not call the optimizer.

    Args:
        scaler: The scaler, or None: nothing is scaled.
        on_skipped: Called after each skipped step.

    Raises:
        TypeError: ``scaler`` has no ``update``.
    """

    def __init__(self, scaler: Any | None, on_skipped: Callable[[], None]) -> None:
        self._scaler, self._stepped = scaler, False
        if scaler is None:
            return
        update = getattr(scaler, "update", None)
        if update is None:
            raise TypeError(f"scaler={scaler!r} must be a GradScaler or None.")

        @untraced
        def watched(*args: Any, **kwargs: Any) -> None:
            update(*args, **kwargs)
            if not self._stepped:
                on_skipped()
            self._stepped = False

        scaler.update = self._watched = watched

    def note_step(self) -> None:
        """The optimizer was called."""
        self._stepped = True

    def loss_scale(self) -> float | None:
        """What the loss is multiplied by in the step at hand; None without a scaler."""
        return None if self._scaler is None else float(self._scaler.get_scale())

    def detach(self) -> None:
        """Gives the scaler its own ``update`` back, unless another scheduler has taken it since."""
        if self._scaler is not None and vars(self._scaler).get("update") is self._watched:
            del self._scaler.update
