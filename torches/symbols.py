"""What the extension takes from torch's libraries by name, as ``nm`` tells it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from .place import Place

# Of libstdc++, of which torch's libraries hold parts.
_STANDARD = re.compile(r"_Z(?:T[VSIT])?N?K?S[tabsiod]")
_LIBRARIES = ("libtorch_cpu.so", "libtorch_python.so", "libc10.so")


def taken(extension: Path, torch: Place) -> set[str]:
    """Names that ``extension`` asks for and the libraries of ``torch``, for which it was built, define."""
    asked = {name for name in _names(extension, "--undefined-only") if not _STANDARD.match(name)}
    return asked & offered(torch)


def offered(torch: Place) -> set[str]:
    """Names that the libraries of ``torch`` define."""
    return {name for library in _LIBRARIES for name in _names(torch.home / "lib" / library, "--defined-only")}


def _names(library: Path, which: str) -> set[str]:
    command = ["nm", "--dynamic", "--format=posix", which, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.split()[0].partition("@")[0] for line in done.stdout.splitlines()}
