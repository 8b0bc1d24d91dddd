"""Files of an adapter: written whole or not at all, and checked before they are read."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open


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


class staged:
    """Context: a folder whose files replace those of ``target`` when the block ends without error."""

    _PREFIX = ".increlora-save-"

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Path:
        self._target.mkdir(parents=True, exist_ok=True)
        for left in self._target.glob(f"{self._PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        self._stage = Path(tempfile.mkdtemp(prefix=self._PREFIX, dir=self._target))
        return self._stage

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                for file in sorted(path for path in self._stage.rglob("*") if path.is_file()):
                    goal = self._target / file.relative_to(self._stage)
                    goal.parent.mkdir(parents=True, exist_ok=True)
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
                    os.replace(file, goal)
        finally:
            shutil.rmtree(self._stage, ignore_errors=True)
