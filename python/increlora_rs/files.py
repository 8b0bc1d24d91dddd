"""Files of an adapter: written whole or not at all, and checked before they are read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, goal)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
