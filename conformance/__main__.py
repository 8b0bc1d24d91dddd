"""``python -m conformance``: runs PEFT's tests on methods and holds the counts to docs/conformance.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from increlora_rs.contract.method import Method
from increlora_rs.methods import METHODS

from . import archive, document
from .counts import FAMILIES, no_outcomes
from .expectations import expected_of
from .models import hub

_ROOT = Path(__file__).parent.parent
_BY_NAME = {method.name: method for method in METHODS}
_STATES = ("fresh", "grown")
# What a run that names no method runs of all but the first: a quarter of a minute each.
_SAMPLE = ("test_seq_classifier", "test_config")


@dataclass(frozen=True)
class _Run:
    """One process of pytest: a method, a state, the files of PEFT's tests."""

    method: Method
    state: str
    families: Sequence[str]

    def file(self, kind: str) -> Path:
        return archive.WORK / f"{self.method.name}-{self.state}.{kind}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    options, to_pytest = parser.parse_known_args(arguments)
    named = list(_BY_NAME) if options.all else options.method
    if options.write and not named:
        parser.error("--write needs --all or --method NAME: of some methods only a sample would run")
    runs = [
        _Run(method, state, tuple(FAMILIES) if named or method is METHODS[0] else _SAMPLE)
        for method in METHODS
        if not named or method.name in named
        for state in expected_of(method.name).states
        if state in (options.state or _STATES)
    ]
    tests = archive.tests()
    hubs = {run.method.name: hub(run.method) for run in runs}
    # A process a core: the models are small.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(_pytest, run, tests, hubs[run.method.name], to_pytest) for run in runs]
    for run in runs:
        print(f"== {run.method.name}, {run.state} ==\n{run.file('log').read_text(encoding='utf-8').rstrip()}")
    failed = sum(process.result() != 0 for process in started)
    if failed or to_pytest or options.state:
        return failed
    counts: dict[str, document.Counts] = {}
    for run in runs:
        text = run.file("json").read_text(encoding="utf-8")
        of_all = {FAMILIES[family]: no_outcomes() for family in run.families}
        counts.setdefault(run.method.title, {})[run.state] = of_all | json.loads(text)
    if options.write:
        document.write(counts)
        return 0
    complaints = document.compare(counts)
    print("\n".join(complaints) or f"{document.PATH.name} says the same")
    return int(bool(complaints))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conformance",
        description=f"Runs PEFT's own tests on {METHODS[0].title}, and a sample of them on the others. What "
        "is not listed here goes to pytest; a run with such arguments, or of one state, is for looking: its "
        "counts are not compared.",
    )
    parser.add_argument(
        "--method", choices=[*_BY_NAME], action="append", help="run all of them on this method"
    )
    parser.add_argument("--all", action="store_true", help="run all of them on every method")
    parser.add_argument("--state", choices=_STATES, action="append", help="run this state only")
    parser.add_argument(
        "--write", action="store_true", help="write what docs/conformance.md says of the methods anew"
    )
    return parser


def _pytest(run: _Run, tests: Path, models: Path, to_pytest: Sequence[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-c", str(Path(__file__).parent / "pytest.ini")]
    command += ["--rootdir", str(tests.parent), "--counts", str(run.file("json"))]
    command += ["--method", run.method.name, *(["--grown"] if run.state == "grown" else [])]
    command += [*to_pytest, *(str(tests / f"{family}.py") for family in run.families)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(_ROOT), str(tests.parent), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(archive.WORK / "cache"),
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
        # The runs go on beside each other, and the models are small.
        "OMP_NUM_THREADS": "1",
        # On a GPU other tests would run than those that are counted.
        "CUDA_VISIBLE_DEVICES": "",
    }
    with open(run.file("log"), "wb") as log:
        return subprocess.call(command, cwd=models, env=environment, stdout=log, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    sys.exit(main())
