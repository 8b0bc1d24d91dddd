"""``python -m conformance``: runs PEFT's tests in both states and holds the counts to docs/conformance.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import archive, document
from .counts import FAMILIES
from .models import hub

_ROOT = Path(__file__).parent.parent
_STATES = ("fresh", "grown")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options, to_pytest = _parser().parse_known_args(arguments)
    tests, models = archive.tests(), hub()
    runs = {state: _start(state, tests, models, to_pytest) for state in options.state or _STATES}
    failed = [state for state, run in runs.items() if run.wait() != 0]
    for state in runs:
        print(f"== {state} ==\n{_file(state, 'log').read_text(encoding='utf-8').rstrip()}")
    if failed or to_pytest or options.state:
        return len(failed)
    counts = {state: json.loads(_file(state, "json").read_text(encoding="utf-8")) for state in runs}
    if options.write:
        document.PATH.write_text(document.render(counts), encoding="utf-8")
        return 0
    complaints = document.compare(counts)
    print("\n".join(complaints) or f"{document.PATH.name} says the same")
    return int(bool(complaints))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conformance",
        description="Runs PEFT's own tests on IncreLoraConfig. Arguments that are not listed here go to "
        "pytest; a run with such, or of one state, is for looking: its counts are not compared.",
    )
    parser.add_argument("--write", action="store_true", help="write docs/conformance.md anew")
    parser.add_argument("--state", choices=_STATES, action="append", help="run this state only")
    return parser


def _start(state: str, tests: Path, models: Path, to_pytest: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-c", str(Path(__file__).parent / "pytest.ini")]
    command += ["--rootdir", str(tests.parent), "--counts", str(_file(state, "json"))]
    command += ["--grown"] if state == "grown" else []
    command += [*to_pytest, *(str(tests / f"{family}.py") for family in FAMILIES)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(_ROOT), str(tests.parent), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(archive.WORK / "cache"),
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
        # The states run beside each other, and the models are small.
        "OMP_NUM_THREADS": "1",
        # On a GPU other tests would run than those that are counted.
        "CUDA_VISIBLE_DEVICES": "",
    }
    with open(_file(state, "log"), "wb") as log:
        return subprocess.Popen(command, cwd=models, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _file(state: str, kind: str) -> Path:
    return archive.WORK / f"{state}.{kind}"


if __name__ == "__main__":
    sys.exit(main())
