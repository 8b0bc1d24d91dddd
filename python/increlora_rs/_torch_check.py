"""Refuses a torch that the extension cannot run with, before the extension is loaded.

An extension may load under a torch whose tensors lie otherwise in memory, without complaint, and
compute nonsense. So the version that it was built for is read from the bytes of its file, and
``torches.json`` says with which others such a build was tried.
"""

import json
import mmap
import re
from importlib.util import find_spec
from pathlib import Path

import torch

_MARK = re.compile(rb"increlora_rs built for torch ([0-9.]+);")
# Made by `python -m torches`, a row a trial that passed.
_TRIALS = Path(__file__).with_name("torches.json")
# Of these the source can be built by older bindings.
_OLDER = ((2, 11), (2, 12))


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
    version = marked(Path(spec.origin))
    if version is None:
        raise ImportError(f"{spec.origin} is not an extension of increlora_rs; reinstall it.")
    return version


def marked(extension: Path) -> str | None:
    """The version of torch that a file of the extension says it was built for; None of any other file."""
    # An empty file cannot be mapped.
    if not extension.stat().st_size:
        return None
    with (
        extension.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        found = _MARK.search(data)
        return found.group(1).decode() if found else None


def runs_with(built: str) -> list[tuple[int, int]]:
    """Minor versions of torch, in order, under which a build for ``built`` may run: its own, and those of
    trials of a build for the same minor version.
    """
    trials = json.loads(_TRIALS.read_text(encoding="utf-8"))
    tried = {_minor(trial["torch"]) for trial in trials if _minor(trial["built_for"]) == _minor(built)}
    return sorted({_minor(built), *tried})


def require_matching_torch() -> None:
    """Raises ImportError unless the extension may run with the installed torch."""
    built = built_for()
    accepted = runs_with(built)
    if _minor(torch.__version__) in accepted:
        return
    others = [_text(minor) for minor in accepted if minor != _minor(built)]
    tried = f" and tried with {', '.join(others)}" if others else ""
    raise ImportError(
        f"increlora_rs was built for torch {_text(_minor(built))}{tried}, but torch {torch.__version__} is "
        f'installed. Install one that it runs with, `pip install "{_range(accepted)}"`'
        f"{_rebuild(_minor(torch.__version__))}."
    )


def _range(accepted: list[tuple[int, int]]) -> str:
    major, last = accepted[-1]
    if len(accepted) == 1:
        return f"torch=={major}.{last}.*"
    return f"torch>={_text(accepted[0])},<{major}.{last + 1}"


def _rebuild(have: tuple[int, int]) -> str:
    """How to build for a torch, if that may work: headers tell a compiler what a loaded library does not."""
    if have < min(_OLDER):
        return ""
    command = "pip install --no-build-isolation --no-deps ."
    if have in _OLDER:
        command = f"make wheel TORCH={_text(have)}.0"
    return f", or build increlora_rs for that torch in the folder of its source: `{command}`"


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _text(minor: tuple[int, int]) -> str:
    return ".".join(map(str, minor))
