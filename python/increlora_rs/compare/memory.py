"""The memory that a training takes at its peak, beside what the process held before."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What sets the peak back to what is resident now (proc(5)).
_RESET_PEAK = "5"


class PeakMemory(TrainerCallback):
    """The peak of all training steps, evaluations left out; made before the model is.

    On a GPU it is the peak of what torch has allocated there, else that of the process's resident memory.

    Attributes:
        bytes: What was added at the peak; None where the system does not tell.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        # What nothing uses any more would be freed some time later.
        gc.collect()
        self._before = _now()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What loading or an evaluation took is none of the training's."""
        self._is_reset = _reset()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the evaluation."""
        peak = _peak() if self._is_reset else None
        if peak is not None and self._before is not None:
            self.bytes = max(self.bytes or 0, peak - self._before)


def warm_up(model: nn.Module, batch: Mapping[str, Tensor], precision: str) -> None:
    """A pass forward and backward: what torch sets up in the first one of a process and keeps would count as
    the first method's. On a GPU it is not among what is measured."""
    if torch.cuda.is_available():
        return
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(**batch).logits
    logits.sum().backward()


def _now() -> int | None:
    _give_back()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _resident("VmRSS")


def _peak() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")


def _reset() -> bool:
    _give_back()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])


def _give_back() -> None:
    """The C library keeps pages that an earlier training has freed, and a later one that takes them would
    add nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
