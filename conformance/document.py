"""docs/conformance.md: a section a method, written from the counts of a run; later runs are held to it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from increlora_rs.methods import METHODS

from .counts import FAMILIES

PATH = Path(__file__).parent.parent / "docs" / "conformance.md"
#: Of one method: by state, family and outcome.
Counts = dict[str, dict[str, dict[str, Any]]]
_PACKAGES = {"peft": "PEFT", "transformers": "Transformers", "torch": "torch", "bitsandbytes": "bitsandbytes"}

_HEAD = """\
# PEFT's own tests

`python -m conformance --method NAME` runs PEFT's tests with `LoraConfig` replaced by the method's
configuration: in PEFT's tables of cases, in their conditions and in the bodies of tests alike, so each test
does with our class what it does with LoRA. `make conformance`, a part of `make test`, does so for IncreLoRA
and runs a sample of the tests for every other method; `make conformance-all` runs all for all. The tests
come at run time from the source archive of the installed PEFT; none of them is kept here. Models of the hub
are replaced by models of the same architectures with random weights and few parameters.

Every test runs **fresh**, with adapters as they are made. Of a method whose ranks grow it runs a second time
**grown**, where each new adapter has gained 0, 1 or 2 components a module before the test gets it.
Torch's random numbers begin alike in every test: some of PEFT's miss their bounds by rounding at one
draw in a hundred, with LoRA too.

A test in which no configuration of ours is made says nothing about it: it is not counted, and its failure
does not fail the run. One that fails because something was refused by name counts as skipped: options are
refused when the configuration is made, modules when the adapter is put in. Those that must fail run, and one
that passes fails the run.

`python -m conformance --all --write` writes this file, with `--method NAME` one section of it. A run fails if
a test fails, if a test that must fail passes, if a skip has a reason that `conformance/expectations` does not
know, if fewer tests of a family pass than stand here and, with the same packages, if anything else here has
changed.
"""

_SECTION = """\
## {title}

{packages}

| family | state | passed | skipped | must fail |
| --- | --- | ---: | ---: | ---: |
{rows}"""


def write(counts: dict[str, Counts]) -> None:
    """Writes the sections of the methods, by title, that were run; leaves those of the others."""
    sections = _recorded() | {title: _section(title, of) for title, of in counts.items()}
    known = [sections[method.title] for method in METHODS if method.title in sections]
    PATH.write_text("\n".join([_HEAD, *known]), encoding="utf-8")


def compare(counts: dict[str, Counts]) -> list[str]:
    """What is wrong with the counts by method, measured by the document; empty if nothing is."""
    recorded = _recorded()
    return [line for title, of in counts.items() for line in _complaints(title, of, recorded.get(title, ""))]


def _complaints(title: str, counts: Counts, recorded: str) -> Iterator[str]:
    rewrite = f"`python -m conformance --method {_name(title)} --write`"
    if not recorded:
        if len(next(iter(counts.values()))) < len(FAMILIES):
            # Of a method that was never run in full nothing is recorded that a sample could be held to.
            return
        yield f"{PATH.name} says nothing of {title}; write it by {rewrite}"
        return
    for family, state, passed, *_ in _summary(counts):
        found = re.search(rf"^\| {re.escape(family)} \| {state} \| (\d+) \|", recorded, re.MULTILINE)
        if found and passed < int(found[1]):
            yield f"{title}, {family}, {state}: {passed} tests passed, at least {found[1]} must"
    families = next(iter(counts.values()))
    was, is_now = (_lines_of(families, text) for text in (recorded, _section(title, counts)))
    if _packages() in recorded and was != is_now:
        yield (
            f"{PATH.name} is not what this run gives; look at the difference, and write it anew by {rewrite} "
            "if it is right:"
        )
        yield from difflib.unified_diff(was, is_now, lineterm="", n=0)


def _lines_of(families: Iterable[str], section: str) -> list[str]:
    """The rows of a section that are about families; what else it holds follows from them."""
    return [line for line in section.splitlines() if any(f"| {family} |" in line for family in families)]


def _recorded() -> dict[str, str]:
    """The sections that the document holds, by title."""
    if not PATH.exists():
        return {}
    _, *sections = re.split(r"^(?=## )", PATH.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = (section.rstrip("\n") + "\n" for section in sections)
    return {section.splitlines()[0].removeprefix("## "): section for section in found}


def _section(title: str, counts: Counts) -> str:
    rows = [_row(*row) for row in _summary(counts)]
    rows += [_row(f"**{state}**", "", *_totals(counts, state)) for state in counts]
    text = _SECTION.format(title=title, packages=_packages(), rows="".join(rows))
    return text + _reasons("Skipped", counts, "skipped") + _reasons("Must fail", counts, "xfailed")


def _packages() -> str:
    """The sentence that says what the counts belong to."""
    shown = ", ".join(f"{name} {version(package)}" for package, name in _PACKAGES.items())
    return f"The counts are those of {shown}."


def _name(title: str) -> str:
    return next(method.name for method in METHODS if method.title == title)


def _summary(counts: Counts) -> Iterator[tuple[str, str, int, int, int]]:
    for family in FAMILIES.values():
        for state, families in counts.items():
            if family not in families:
                continue
            of = families[family]
            yield family, state, of["passed"], sum(of["skipped"].values()), sum(of["xfailed"].values())


def _totals(counts: Counts, state: str) -> Iterator[int]:
    rows = [numbers for _, row_state, *numbers in _summary(counts) if row_state == state]
    return (sum(column) for column in zip(*rows, strict=True))


def _reasons(title: str, counts: Counts, outcome: str) -> str:
    """A table of the outcome's reasons, a column a state."""
    numbers: dict[tuple[str, str], dict[str, int]] = {}
    for state, families in counts.items():
        for family, of in families.items():
            for reason, number in of[outcome].items():
                numbers.setdefault((reason, family), {})[state] = number
    rows = ((*key, *(numbers[key].get(state, 0) for state in counts)) for key in sorted(numbers))
    head = _row("reason", "family", *counts) + _row("---", "---", *["---:"] * len(counts))
    return f"\n### {title}\n\n{head}" + "".join(_row(*row) for row in rows)


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"
