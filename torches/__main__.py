"""``python -m torches VERSION ...``: tries the build that is there under versions of torch.

A trial passes if every symbol is found, everything lies where it lay in the torch that the build is for,
the tests of the extension and of its operations pass, and a training learns. ``--write`` enters it into the
package's table.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .layout import differences, digest, layout
from .place import ROOT, WORK, Place, place
from .symbols import offered, taken
from .table import PACKAGE, PAGE, TABLE, Trial, built_for, enter, newest, rendered, trials

# The extension, and what stands on its node in autograd's graph.
_TESTS = ("tests/core", "tests/ops")
# The training of torches/training.py has to end below this part of the loss that it begins with.
_LEARNED = 0.3


class Failed(Exception):
    """A trial that did not pass."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m torches", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "versions",
        nargs="*",
        metavar="VERSION",
        help="a release of torch, such as 2.15.0; the newest of the table",
    )
    parser.add_argument("--extension", type=Path, help="another build than the one in python/increlora_rs")
    parser.add_argument(
        "--write", action="store_true", help=f"enter what passed into {TABLE.relative_to(ROOT)}"
    )
    options = parser.parse_args(arguments)
    extension = options.extension or next(PACKAGE.glob("_core*.so"))
    failed = False
    for version in options.versions or [newest(built_for(extension))]:
        try:
            trial = _tried(extension, place(built_for(extension)), place(version))
        except (Failed, RuntimeError) as error:
            failed = True
            print(f"torch {version}: {error}", flush=True)
            continue
        print(f"torch {version}: {json.dumps(trial)}", flush=True)
        if options.write:
            enter(TABLE, trial)
            PAGE.write_text(rendered(trials(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return int(failed)


def _tried(extension: Path, built: Place, under: Place) -> Trial:
    symbols = taken(extension, built)
    if missing := sorted(symbols - offered(under)):
        raise Failed(f"{len(missing)} of {len(symbols)} symbols are not there:\n" + "\n".join(missing))
    was = layout(built)
    if changed := differences(was, layout(under)):
        raise Failed(f"{len(changed)} of {len(was)} types changed:\n" + "\n".join(changed))
    trial: Trial = {
        "built_for": built.version,
        "torch": under.version,
        "machine": platform.machine(),
        "symbols": len(symbols),
        "types": len(was),
        "layout": digest(was),
        "tests": 0,
        "loss": 0.0,
    }
    candidate = _candidate(extension, trial)
    return {**trial, "tests": _tests(under, candidate), "loss": _training(under, candidate, built)}


def _candidate(extension: Path, trial: Trial) -> Path:
    """A folder with a copy of the package whose table takes the torch under trial."""
    folder = WORK / "candidate"
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(extension, package / "_core.abi3.so")
    enter(package / TABLE.name, trial)
    return folder


def _tests(under: Place, candidate: Path) -> int:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["--numprocesses", "logical", "--maxprocesses", "4", *_TESTS]
    done = subprocess.run(
        command, cwd=ROOT, env=under.environment(candidate), capture_output=True, text=True, check=False
    )
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    if done.returncode or passed is None:
        raise Failed(f"tests failed:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return int(passed[1])


def _training(under: Place, candidate: Path, built: Place) -> float:
    command = [sys.executable, "-m", "torches.training"]
    done = subprocess.run(
        command, cwd=ROOT, env=under.environment(candidate), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failed(f"the training failed:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout)
    ran = (result["torch"], result["built_for"], result["loaded_is_the_same"])
    if ran != (under.version, built.version, True) or not result["loss_over_start"] < _LEARNED:
        raise Failed(f"the training ended with {result}")
    return round(result["loss_over_start"], 4)


if __name__ == "__main__":
    sys.exit(main())
