"""An adapter that is whole in several processes is averaged by somebody, or the first step raises by name."""

import sys

import pytest
from launches import WORKERS, torchrun

sys.path.insert(0, str(WORKERS))

import averaged
import ddp

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """What two processes got of each script."""
    out = tmp_path_factory.mktemp("averaged")
    return torchrun(2, "averaged.py", out)


@pytest.fixture(scope="module")
def alone():
    """``alone(script)``: what one process gets that sees all that the script's processes see."""
    known = {}

    def run(script):
        processes = 1 if script == "the same data" else 2
        if processes not in known:
            known[processes] = ddp.train_alone("plain", processes)
        return known[processes]

    return run


@pytest.mark.parametrize("script", averaged.RIGHT)
def test_a_script_that_averages_equals_one_process_with_the_averaged_loss(scripts, alone, script):
    first, second = (result[script] for result in scripts)
    whole = alone(script)
    assert first["ranks"] == second["ranks"] == whole["ranks"]
    assert max(first["ranks"].values()) > 3
    for name, parameter in whole["parameters"].items():
        for result in (first, second):
            assert (result["parameters"][name] - parameter).norm() < 1e-9 * parameter.norm(), name


@pytest.mark.parametrize("script", averaged.WRONG)
def test_a_script_that_does_not_average_is_refused_in_all_processes_alike(scripts, script):
    first, second = (result[script] for result in scripts)
    assert first == second
    assert first["step"] == (1 if script == "averaged in the first step alone" else 0)
    said = "the adapter's parameters of" if script == "other values" else "the gradients of the adapter's"
    assert first["error"].startswith(f"model: {said}")
    assert "differ between the 2 processes" in first["error"]


def test_the_modules_that_nobody_averages_are_named(scripts):
    error = scripts[0]["a wrapper around some modules"]["error"]
    assert "'0', '4'" in error
    assert "'2'" not in error
