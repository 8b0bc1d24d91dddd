"""Refuses a torch that the extension was not built for, before the extension is loaded.

An extension built for another torch may load without complaint and crash later, so its version is
read from the bytes of its file.
"""

import mmap
import os
import re
from importlib.util import find_spec

import torch

_MARK = re.compile(rb"increlora_rs built for torch ([0-9.]+);")


def built_for() -> str:
    """Version of torch that the installed extension was built for, e.g. ``"2.13.0"``.

    Raises:
        ImportError: the extension is missing, or is no build of this package.
    """
    spec = find_spec("increlora_rs._core")
    if spec is None or spec.origin is None:
        raise ImportError(
            "increlora_rs._core is missing: the package was not built. Run `pip install .` in the "
            "project's folder."
        )
    version = None
    # An empty file cannot be mapped.
    if os.path.getsize(spec.origin):
        with (
            open(spec.origin, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            found = _MARK.search(data)
            version = found.group(1).decode() if found else None
    if version is None:
        raise ImportError(f"{spec.origin} is not an extension of increlora_rs; reinstall it.")
    return version


def require_matching_torch() -> None:
    """Raises ImportError unless the installed torch has the major.minor version built for."""
    built = built_for()
    want, have = built.split(".")[:2], torch.__version__.split(".")[:2]
    if want != have:
        minor = ".".join(want)
        raise ImportError(
            f"increlora_rs was built for torch {minor} but torch {torch.__version__} is installed. "
            f'Install the matching one, `pip install "torch=={minor}.*"`, or rebuild increlora_rs '
            "in this environment from its source."
        )
