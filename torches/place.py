"""One version of torch: that of this environment, or one beside it with what it depends on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
#: Everything that a trial installs or makes.
WORK = ROOT / "target" / "torches"


@dataclass(frozen=True)
class Place:
    """Where the package ``torch`` of a version is: in this environment, or in a ``folder`` of its own."""

    version: str
    home: Path
    folder: Path | None = None

    def environment(self, *paths: Path) -> dict[str, str]:
        """Variables of a process that imports this torch, packages from ``paths`` before installed ones."""
        first = [] if self.folder is None else [self.folder]
        return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*first, *paths, ROOT)))}


def place(version: str) -> Place:
    """The torch of ``version``; fetched, with what it depends on, if this environment has another.

    Raises:
        RuntimeError: the package registry does not give it, or it is not of that version.
    """
    home = Path(torch.__path__[0])
    if _version(home) == version:
        return Place(version, home)
    folder = WORK / version
    if not folder.is_dir():
        _install(version, folder)
    found = _version(folder / "torch")
    if found != version:
        raise RuntimeError(f"{folder} holds torch {found}, not {version}; remove it")
    return Place(version, folder / "torch", folder)


def _install(version: str, folder: Path) -> None:
    # In one move at the end: an interrupted run is not taken for a finished one.
    unfinished = folder.with_suffix(".part")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-compile"]
    done = subprocess.run(
        [*command, "--target", str(unfinished), f"torch=={version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"torch {version} cannot be installed:\n{done.stderr.strip()}")
    unfinished.rename(folder)


def _version(home: Path) -> str | None:
    """The release that an installed torch says it is, without what follows a ``+``."""
    found = re.search(
        r"^__version__ = '([^'+]+)", (home / "version.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    return found and found[1]
