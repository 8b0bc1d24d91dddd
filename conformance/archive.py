"""PEFT's tests, from the source archive of the version that is installed; fetched once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Python's early releases of 3.10 and 3.11 have no filters.
_SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
#: Everything that a run fetches or makes.
WORK = Path(__file__).parent.parent / "target" / "conformance"
_PACKAGE = "peft_tests"


def tests() -> Path:
    """The folder of PEFT's tests, a package of the name ``peft_tests``.

    Raises:
        RuntimeError: the package registry does not give the archive.
    """
    home = WORK / f"peft-{version('peft')}"
    package = home / _PACKAGE
    if package.is_dir():
        return package
    home.mkdir(parents=True, exist_ok=True)
    unpacked = home / f"peft-{version('peft')}"
    with tarfile.open(_download(home)) as archive:
        members = [m for m in archive.getmembers() if m.name.startswith(f"{unpacked.name}/tests/")]
        archive.extractall(home, members, **_SAFELY)
    (unpacked / "tests" / "__init__.py").touch()
    # Last, and in one move: an interrupted run is not taken for a finished one.
    (unpacked / "tests").rename(package)
    shutil.rmtree(unpacked)
    return package


def _download(folder: Path) -> Path:
    name = f"peft=={version('peft')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    command += ["--dest", str(folder), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("peft-*.tar.gz"))
    if done.returncode or not found:
        raise RuntimeError(f"the source archive of {name} cannot be downloaded:\n{done.stderr.strip()}")
    return found[-1]
