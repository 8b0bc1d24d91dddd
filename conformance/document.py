"""docs/conformance.md: written from the counts of a run, and what later runs are held to."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .counts import FAMILIES

PATH = Path(__file__).parent.parent / "docs" / "conformance.md"
Counts = dict[str, dict[str, dict[str, Any]]]
_PACKAGES = {"peft": "PEFT", "transformers": "Transformers", "torch": "torch", "bitsandbytes": "bitsandbytes"}

_HEAD = """\
# PEFT's own tests

`make conformance` runs PEFT's tests with `LoraConfig` replaced by `IncreLoraConfig`: in PEFT's tables of
cases, in their conditions and in the bodies of tests alike, so each test does with our class what it
does with LoRA. The tests come at run time from the source archive of the installed PEFT; none of them is
kept here. Models of the hub are replaced by models of the same architectures with random weights and few
parameters.

Every test runs twice: **fresh**, with adapters as they are made (rank 1), and **grown**, where each new
adapter has gained 0, 1 or 2 components a module before the test gets it.

A test in which no configuration of ours is made says nothing about it: it is not counted, and its failure
does not fail the run. One that fails because something was refused by name counts as skipped.

This file is written by `python -m conformance --write`. A run fails if a test fails, if a test that must
fail passes, if a skip has a reason that `conformance/expectations.py` does not know, if fewer tests of a
family pass than stand here and, with the same packages, if anything else here has changed.

{packages}

| family | state | passed | skipped | must fail |
| --- | --- | ---: | ---: | ---: |
"""

_REASONS = """
## {title}

{text}

| reason | family | fresh | grown |
| --- | --- | ---: | ---: |
"""

_SKIPPED = "Options are refused when the configuration is made, modules when the adapter is put in."
_MUST_FAIL = "These run, and are expected to fail; one that passes fails the run."


def render(counts: Counts) -> str:
    """The document for counts by state, family and outcome."""
    text = _HEAD.format(packages=_packages())
    text += "".join(_row(*row) for row in _summary(counts))
    text += "".join(_row(f"**{state}**", "", *_totals(counts, state)) for state in counts)
    text += _REASONS.format(title="Skipped", text=_SKIPPED) + _reasons(counts, "skipped")
    text += _REASONS.format(title="Must fail", text=_MUST_FAIL) + _reasons(counts, "xfailed")
    return text


def compare(counts: Counts) -> list[str]:
    """What is wrong with ``counts``, measured by the document; empty if nothing is."""
    if not PATH.exists():
        return [f"{PATH.name} does not exist; write it by `python -m conformance --write`"]
    recorded = PATH.read_text(encoding="utf-8")
    passed = {(family, state): number for family, state, number, *_ in _summary(counts)}
    complaints = []
    for family, state, minimum in re.findall(
        r"^\| ([^|]+) \| (fresh|grown) \| (\d+) \|", recorded, re.MULTILINE
    ):
        if passed.get((family, state), 0) < int(minimum):
            complaints.append(
                f"{family}, {state}: {passed.get((family, state), 0)} tests passed, at least {minimum} must"
            )
    if _packages() in recorded and recorded != render(counts):
        complaints.append(
            f"{PATH.name} is not what this run gives; look at the difference, and write it anew with "
            "`python -m conformance --write` if it is right:"
        )
        complaints += difflib.unified_diff(
            recorded.splitlines(), render(counts).splitlines(), lineterm="", n=0
        )
    return complaints


def _packages() -> str:
    """The sentence that says what the counts belong to."""
    shown = ", ".join(f"{name} {version(package)}" for package, name in _PACKAGES.items())
    return f"The counts are those of {shown}."


def _summary(counts: Counts) -> Iterator[tuple[str, str, int, int, int]]:
    for family in FAMILIES.values():
        for state, families in counts.items():
            of = families[family]
            yield family, state, of["passed"], sum(of["skipped"].values()), sum(of["xfailed"].values())


def _totals(counts: Counts, state: str) -> Iterator[int]:
    rows = [numbers for _, row_state, *numbers in _summary(counts) if row_state == state]
    return (sum(column) for column in zip(*rows, strict=True))


def _reasons(counts: Counts, outcome: str) -> str:
    numbers: dict[tuple[str, str], dict[str, int]] = {}
    for state, families in counts.items():
        for family, of in families.items():
            for reason, number in of[outcome].items():
                numbers.setdefault((reason, family), {})[state] = number
    rows = ((*key, *(numbers[key].get(state, 0) for state in counts)) for key in sorted(numbers))
    return "".join(_row(*row) for row in rows)


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"
