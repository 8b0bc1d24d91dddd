"""Which versions of torch the package takes, and what it says of the others."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from increlora_rs import _core, _torch_check

ROOT = Path(__file__).parents[1]
TRIALS = json.loads((ROOT / "python" / "increlora_rs" / "torches.json").read_text())


@pytest.fixture
def check(monkeypatch, tmp_path):
    """With trials of a build for torch 2.13 under 2.14 and 2.15, ``check(built, version)``: what is said of a
    build for one torch under another; None if it runs.
    """

    rows = [{"built_for": "2.13.0", "torch": version} for version in ("2.13.0", "2.15.0", "2.14.1")]
    table = tmp_path / "torches.json"
    table.write_text(json.dumps(rows))
    monkeypatch.setattr(_torch_check, "_TRIALS", table)

    def run(built, version):
        monkeypatch.setattr(_torch_check, "built_for", lambda: built)
        monkeypatch.setattr(torch, "__version__", version)
        try:
            return _torch_check.require_matching_torch()
        except ImportError as error:
            return str(error)

    return run


def test_extension_says_the_torch_it_was_built_for():
    assert f"torch {_torch_check.built_for()};" in _core.BUILT_FOR


@pytest.mark.parametrize("version", ["2.13.0", "2.13.7", "2.13.1+cu130", "2.13.0a0+git123"])
def test_torch_of_the_minor_version_built_for_is_accepted(check, version):
    assert check("2.13.0", version) is None


@pytest.mark.parametrize("version", ["2.14.0", "2.14.1+cpu", "2.15.0+cu132", "2.15.9"])
def test_a_torch_with_which_a_build_was_tried_is_accepted(check, version):
    assert check("2.13.0", version) is None


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.12.1", "2.16.0+cpu", "2.1.3", "3.13.0", "2.130.0", "2.99.0"]
)
def test_other_torch_is_refused_with_the_line_that_installs_the_right_one(check, version):
    said = check("2.13.0", version)
    assert f"built for torch 2.13 and tried with 2.14, 2.15, but torch {version} is installed" in said
    assert 'pip install "torch>=2.13,<2.16"' in said


@pytest.mark.parametrize(
    ("version", "way"),
    [
        ("2.11.0+cu130", "`make wheel TORCH=2.11.0`"),
        ("2.12.1", "`make wheel TORCH=2.12.0`"),
        ("2.16.0", "`pip install --no-build-isolation --no-deps .`"),
        ("3.0.0", "`pip install --no-build-isolation --no-deps .`"),
    ],
)
def test_a_torch_that_nobody_tried_is_refused_with_the_way_to_build_for_it(check, version, way):
    assert f"in the folder of its source: {way}." in check("2.13.0", version)


def test_a_torch_that_the_source_does_not_build_for_is_refused_without_such_a_way(check):
    assert check("2.13.0", "2.10.1").endswith('`pip install "torch>=2.13,<2.16"`.')


@pytest.mark.parametrize("version", ["2.12.0", "2.13.0"])
def test_a_build_that_was_tried_with_no_other_torch_runs_with_its_own_alone(check, version):
    assert check("2.11.0", "2.11.1") is None
    said = check("2.11.0", version)
    assert "built for torch 2.11, but" in said
    assert 'pip install "torch==2.11.*"' in said


def test_a_build_for_a_torch_newer_than_all_trials_runs_with_that(check):
    assert check("2.99.0", "2.99.1") is None
    assert "built for torch 2.99, but torch 2.13.0" in check("2.99.0", "2.13.0")


def test_other_torch_is_refused_before_the_extension_is_loaded():
    code = """
import sys, torch
torch.__version__ = '2.1.0'
try:
    import increlora_rs
except ImportError as error:
    print('pip install' in str(error), 'increlora_rs._core' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("content", [b"", b"\x7fELF" + bytes(5000), b"increlora_rs built for torch "])
def test_extension_file_without_its_mark_is_refused_by_path(monkeypatch, tmp_path, content):
    path = tmp_path / "_core.so"
    path.write_bytes(content)
    monkeypatch.setattr(_torch_check, "find_spec", lambda name: SimpleNamespace(origin=str(path)))
    with pytest.raises(ImportError) as error:
        _torch_check.require_matching_torch()
    assert str(path) in str(error.value)


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)])
def test_missing_extension_is_refused_with_the_line_that_builds_it(monkeypatch, spec):
    monkeypatch.setattr(_torch_check, "find_spec", lambda name: spec)
    with pytest.raises(ImportError, match=r"_core is missing.*pip install \."):
        _torch_check.require_matching_torch()


# The table, and what else names versions.


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: f"{trial['built_for']}-{trial['torch']}")
def test_a_trial_in_the_table_is_believed(monkeypatch, trial):
    monkeypatch.setattr(_torch_check, "built_for", lambda: trial["built_for"])
    monkeypatch.setattr(torch, "__version__", trial["torch"])
    assert _torch_check.require_matching_torch() is None


def test_every_trial_passed_the_tests_and_learned_with_one_layout():
    assert len({(trial["machine"], trial["built_for"], trial["layout"]) for trial in TRIALS}) == len(
        {(trial["machine"], trial["built_for"]) for trial in TRIALS}
    )
    assert all(trial["tests"] > 1000 and trial["symbols"] > 100 and 0 < trial["loss"] < 1 for trial in TRIALS)


def test_the_package_depends_on_the_versions_that_its_oldest_build_was_tried_with():
    pyproject = (ROOT / "pyproject.toml").read_text()
    oldest = re.search(r'"torch>=([\d.]+),<', pyproject)[1]
    minors = _torch_check.runs_with(f"{oldest}.0")
    assert minors == [(2, minor) for minor in range(minors[0][1], minors[-1][1] + 1)]
    assert f'"torch>=2.{minors[0][1]},<2.{minors[-1][1] + 1}",' in pyproject
    assert min(minors) == tuple(map(int, oldest.split(".")))
