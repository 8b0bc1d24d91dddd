"""An optimizer's step within its step: where a class calls that of the class it inherits from."""

from __future__ import annotations

import sys

import torch

_TORCH = torch.optim.Optimizer.profile_hook_step.__code__.co_filename


class StepDepth:
    """Tells the hooks of an optimizer's step from those of a step within it.

    torch calls the hooks around each class's step, so ``super().step()`` calls them again.
    """

    def __init__(self) -> None:
        self._inside = False
        self._nested = 0

    def enters(self, optimizer: torch.optim.Optimizer) -> bool:
        """In a hook before a step: is it the outermost?"""
        # After an exception in a step no hook told that it ended, so the stack has to say.
        if self._inside and _steps_on_stack(optimizer) > 1:
            self._nested += 1
            return False
        self._inside, self._nested = True, 0
        return True

    def leaves(self) -> bool:
        """In a hook after a step: is it the outermost?"""
        if self._nested:
            self._nested -= 1
            return False
        self._inside = False
        return True


def _steps_on_stack(optimizer: torch.optim.Optimizer) -> int:
    count, frame = 0, sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == _TORCH and frame.f_code.co_name == "wrapper":
            count += frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return count
