"""maturin's build backend, which compiles against the torch that is there.

pip builds in an environment of its own, which does not see the packages of the one that it installs into.
The extension is for one minor version of torch at its best (docs/torch.md), so what to compile against is
looked for here, in this order: a torch that this process can import (no isolation); that of the environment
which pip installs into, without fetching it again; the oldest that the package runs with.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import maturin
from maturin import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_Settings = Mapping[str, Any] | None


def get_requires_for_build_wheel(config_settings: _Settings = None) -> list[str]:
    """What a build needs beside maturin: a torch, where none is at hand."""
    requires = maturin.get_requires_for_build_wheel(config_settings)
    if find_spec("torch") is not None or _usable():
        return requires
    oldest, _ = _range()
    return [*requires, f"torch=={_installed() or f'{oldest[0]}.{oldest[1]}.0'}", "setuptools"]


def build_wheel(
    wheel_directory: str, config_settings: _Settings = None, metadata_directory: str | None = None
) -> str:
    """As PEP 517 has it."""
    with _environment():
        return str(maturin.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: _Settings = None, metadata_directory: str | None = None
) -> str:
    """As PEP 660 has it."""
    with _environment():
        return str(maturin.build_editable(wheel_directory, config_settings, metadata_directory))


get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_wheel = maturin.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = maturin.prepare_metadata_for_build_wheel


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """The variables by which build scripts of Rust find the interpreter whose torch they compile against."""
    before = dict(os.environ)
    # They run `python`, or `python3` where no VIRTUAL_ENV is set: pip's environment need not be active.
    folder = Path(sys.executable).parent
    os.environ["PATH"] = os.pathsep.join([str(folder), os.environ.get("PATH", os.defpath)])
    if (folder / "python").exists():
        os.environ["VIRTUAL_ENV"] = sys.prefix
    else:
        os.environ.pop("VIRTUAL_ENV", None)
    if find_spec("torch") is None:
        # Of pip's, by which an interpreter sees the packages of the build alone.
        os.environ.pop("PYTHONPATH", None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _usable() -> bool:
    """Can the torch of the environment which pip installs into be compiled against where it is?"""
    # torch.utils.cpp_extension, which the build scripts ask for folders, imports setuptools.
    return _installed() is not None and (_packages() / "setuptools").is_dir()


def _installed() -> str | None:
    """The release of torch, such as "2.15.0", that the environment which pip installs into has and keeps."""
    version = _packages() / "torch" / "version.py"
    if not version.is_file():
        return None
    found = re.search(
        r"^__version__ = '(\d+)\.(\d+)\.(\d+)", version.read_text(encoding="utf-8"), re.MULTILINE
    )
    oldest, first_refused = _range()
    if found is None or not oldest <= (int(found[1]), int(found[2])) < first_refused:
        return None
    return f"{found[1]}.{found[2]}.{found[3]}"


def _packages() -> Path:
    # In pip's environment too, sys.prefix is that of the interpreter which pip runs with.
    return Path(sysconfig.get_path("platlib"))


def _range() -> tuple[tuple[int, int], tuple[int, int]]:
    """The first minor version of torch that the package depends on, and the first that it does not take."""
    text = Path("pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)"', text)
    if found is None:
        raise ValueError('pyproject.toml: no dependency of the form "torch>=2.13,<2.16"')
    a, b, c, d = map(int, found.groups())
    return (a, b), (c, d)
