"""The build backend: which torch an installation compiles against."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """The backend in an environment of pip's without torch, for one whose packages are in ``packages``."""
    spec = importlib.util.spec_from_file_location(
        "increlora_backend", ROOT / "backend" / "increlora_backend.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(module.maturin, "get_requires_for_build_wheel", lambda settings: ["of maturin"])
    module.packages = tmp_path
    return module


def installed(packages, version):
    (packages / "torch").mkdir()
    (packages / "torch" / "version.py").write_text(f"__all__ = []\n__version__ = '{version}'\ncuda = None\n")


def test_without_a_torch_the_oldest_is_fetched(backend):
    assert backend.get_requires_for_build_wheel() == ["of maturin", "torch==2.13.0", "setuptools"]


@pytest.mark.parametrize("version", ["2.13.1", "2.14.0+cpu", "2.15.0+cu132"])
def test_a_torch_that_is_there_is_not_fetched_again(backend, version):
    installed(backend.packages, version)
    (backend.packages / "setuptools").mkdir()
    assert backend.get_requires_for_build_wheel() == ["of maturin"]
    assert backend.get_requires_for_build_editable() == ["of maturin"]


def test_without_setuptools_beside_it_the_same_release_is_fetched(backend):
    installed(backend.packages, "2.14.1+cpu")
    assert backend.get_requires_for_build_wheel() == ["of maturin", "torch==2.14.1", "setuptools"]


@pytest.mark.parametrize("version", ["2.12.1", "2.16.0", "3.0.0", "unknown"])
def test_a_torch_that_pip_will_replace_does_not_count(backend, version):
    installed(backend.packages, version)
    (backend.packages / "setuptools").mkdir()
    assert backend.get_requires_for_build_wheel() == ["of maturin", "torch==2.13.0", "setuptools"]


def test_without_isolation_the_torch_at_hand_is_taken_whatever_it_is(backend, monkeypatch):
    monkeypatch.setattr(backend, "find_spec", importlib.util.find_spec)
    assert backend.get_requires_for_build_wheel() == ["of maturin"]


@pytest.mark.parametrize("build", ["build_wheel", "build_editable"])
@pytest.mark.parametrize("isolated", [True, False])
def test_build_scripts_find_the_interpreter_that_pip_runs_with(backend, monkeypatch, build, isolated):
    seen, given = {}, []

    def wheel(*arguments):
        seen.update(os.environ)
        given.append(arguments)
        return "wheel"

    monkeypatch.setattr(backend.maturin, build, wheel)
    monkeypatch.setenv("PYTHONPATH", "of pip's environment")
    monkeypatch.setenv("VIRTUAL_ENV", "another")
    if not isolated:
        monkeypatch.setattr(backend, "find_spec", importlib.util.find_spec)
    assert getattr(backend, build)("out", {"a": "b"}, "metadata") == "wheel"
    assert given == [("out", {"a": "b"}, "metadata")]
    folder = Path(sys.executable).parent
    assert seen["PATH"].split(os.pathsep)[0] == str(folder)
    assert seen.get("VIRTUAL_ENV") == (sys.prefix if (folder / "python").exists() else None)
    assert seen.get("PYTHONPATH") == (None if isolated else "of pip's environment")
    assert (os.environ["PYTHONPATH"], os.environ["VIRTUAL_ENV"]) == ("of pip's environment", "another")


def test_an_error_of_the_build_leaves_the_environment_as_it_was(backend, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("does not compile")

    monkeypatch.setattr(backend.maturin, "build_wheel", fails)
    before = dict(os.environ)
    with pytest.raises(RuntimeError, match="does not compile"):
        backend.build_wheel("out")
    assert dict(os.environ) == before


def test_pyproject_without_the_dependency_is_refused(backend, monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text('dependencies = ["torch"]\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape("torch>=2.13,<2.16")):
        backend.get_requires_for_build_wheel()
