"""The package's table of trials: which build was tried under which torch, and what was seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

from increlora_rs._torch_check import marked

from .place import ROOT

PACKAGE = ROOT / "python" / "increlora_rs"
#: Read by ``increlora_rs._torch_check`` at import.
TABLE = PACKAGE / "torches.json"
#: The page that shows it.
PAGE = ROOT / "docs" / "torch.md"
_BEGIN, _END = "<!-- trials -->", "<!-- end -->"
_HEAD = """\
| built for | under | names | types | layout | tests | loss left by the training |
| --- | --- | ---: | ---: | --- | ---: | ---: |"""


class Trial(TypedDict):
    """A trial that passed: a build, the torch that it ran under, and what was counted."""

    built_for: str
    torch: str
    machine: str
    symbols: int
    types: int
    layout: str
    tests: int
    loss: float


def trials(path: Path = TABLE) -> list[Trial]:
    """The trials of the table at ``path``, by the versions that they are of."""
    found: list[Trial] = json.loads(path.read_text(encoding="utf-8"))
    return sorted(found, key=_key)


def newest(built: str) -> str:
    """The newest torch under which a build for ``built`` was tried; its own where it was under none."""
    return ([trial["torch"] for trial in trials() if trial["built_for"] == built] or [built])[-1]


def enter(path: Path, trial: Trial) -> None:
    """Puts ``trial`` into the table at ``path``, in the place of an earlier one of the same versions."""
    pairs = {_key(old): old for old in trials(path)}
    pairs[_key(trial)] = trial
    rows = ",\n".join(f"  {json.dumps(pairs[key])}" for key in sorted(pairs))
    path.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


def rendered(of: list[Trial], page: str) -> str:
    """``page`` with the table of trials between its marks."""
    rows = [_HEAD]
    for trial in of:
        counted = f"{trial['symbols']} | {trial['types']} | `{trial['layout']}` | {trial['tests']}"
        rows.append(f"| {trial['built_for']} | {trial['torch']} | {counted} | {trial['loss']:.3f} |")
    before, _, rest = page.partition(_BEGIN)
    return "\n".join([before + _BEGIN, "", *rows, "", _END]) + rest.partition(_END)[2]


def built_for(extension: Path) -> str:
    """The version of torch that an extension was built for; ``ValueError`` where it has no mark."""
    version = marked(extension)
    if version is None:
        raise ValueError(f"{extension} is not an extension of increlora_rs")
    return version


def _key(trial: Trial) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, version.split("."))) for version in (trial["built_for"], trial["torch"]))
