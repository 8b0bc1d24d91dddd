"""What the CUDA kernels need from Python: torch's current stream, the run-time compiler that torch's
packages bring, and one line in the log where the kernels cannot be had."""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
from functools import cache
from pathlib import Path

import torch

from .. import _core

logger = logging.getLogger(__name__)

_PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")


def stream(device: torch.device) -> int:
    """Handle of torch's current stream on ``device``, for the kernels, which are loaded at the first call;
    0 where it is no CUDA device."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    prepare(index)
    return torch._C._cuda_getCurrentRawStream(index)


@cache
def prepare(index: int) -> bool:
    """Loads the kernels of CUDA device ``index``; where that fails, says why in the log, once, and
    returns False: everything is then computed by torch's own kernels."""
    _load_compiler()
    reason = _core.cuda_prepare(index)
    if reason is not None:
        logger.warning("the CUDA kernels of increlora_rs are not used, torch's are: %s", reason)
    return reason is None


def _load_compiler() -> None:
    """Makes libnvrtc findable by its name: importing torch usually loads it, not always."""
    for path in compilers():
        try:
            ctypes.CDLL(str(path))
        except OSError:
            continue
        return


def compilers() -> list[Path]:
    """Files of libnvrtc in the installed packages."""
    found: list[Path] = []
    for package in _PACKAGES:
        try:
            files = importlib.metadata.distribution(package).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found += [Path(str(file.locate())) for file in files if file.name.startswith("libnvrtc.so")]
    return found
