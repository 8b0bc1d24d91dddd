"""Files of an adapter: written whole or not at all, and checked before they are read."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


def check_weights_file(path: str) -> None:
    """Raises ValueError if the safetensors file ``path`` exists but cannot be read whole."""
    if not os.path.isfile(path):
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({os.path.getsize(path)} bytes) is not a complete safetensors file: {error}. "
            "Save the adapter again, or restore the file."
        ) from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of one that ``torch.save`` wrote, on the CPU.

    Raises:
        ValueError: the file cannot be read whole.
    """
    if path.suffix == ".safetensors":
        check_weights_file(str(path))
        return load_file(path)
    try:
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) holds no tensors that can be read: {error}. Save the "
            "adapter again, or restore the file."
        ) from error
    return tensors


_STAGE = ".increlora-save-"


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder whose files replace those of ``target`` when the block ends without error."""
    target.mkdir(parents=True, exist_ok=True)
    for left in target.glob(f"{_STAGE}*"):
        shutil.rmtree(left, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=target))
    try:
        yield stage
        for file in sorted(path for path in stage.rglob("*") if path.is_file()):
            goal = target / file.relative_to(stage)
            goal.parent.mkdir(parents=True, exist_ok=True)
            _put(file, goal)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A path in the folder of ``target`` whose file replaces it when the block ends without error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f"{_STAGE}{target.name}")
    try:
        yield stage
        _put(stage, target)
    finally:
        stage.unlink(missing_ok=True)


def _put(file: Path, goal: Path) -> None:
    """Replaces ``goal`` by ``file``, whose bytes are on the disk before."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(file, goal)


def refuse_own_directory(source: object, target: Path) -> None:
    """Raises ValueError if ``target`` is the directory ``source``, which writing would damage."""
    if isinstance(source, (str, os.PathLike)) and target.resolve() == Path(source).resolve():
        raise ValueError(
            f"out_dir={str(target)!r} is the directory of the adapter itself, which the new one would "
            "replace; give another."
        )
