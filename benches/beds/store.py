"""What is costly to make, kept in a folder under a name that says what it was made from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def stored(folder: Path | None, name: str, made_from: object, make: Callable[[], Any]) -> Any:
    """Tensors from the folder's file, made and written where there is none yet.

    Args:
        folder: None: made anew, and not kept.
        name: Begins the file's name.
        made_from: All that determines the tensors, told by its ``repr``.
    """
    if folder is None:
        return make()
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    file = folder / f"{name}-{digest}.pt"
    if not file.exists():
        made = make()
        folder.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: another process may be looking for it.
        part = file.with_suffix(f".{os.getpid()}.part")
        torch.save(made, part)
        part.replace(file)
    return torch.load(file)
