"""The capacity form: parameters of a fixed size, of which the rank says how many rows count."""

import sys

import pytest
import torch
from launches import WORKERS, torchrun

sys.path.insert(0, str(WORKERS))

import capacity

slow = pytest.mark.slow


def assert_same(one, other):
    assert one["ranks"] == other["ranks"]
    assert [row[:3] for row in one["history"]] == [row[:3] for row in other["history"]]
    assert one["history"]
    assert one["adapter"].keys() == other["adapter"].keys()
    for key, value in one["adapter"].items():
        assert (value - other["adapter"][key]).norm() <= 1e-5 * value.norm()


@pytest.mark.parametrize("scenario", capacity.SCENARIOS)
def test_it_ends_as_the_growing_form(scenario):
    assert_same(capacity.train_alone(scenario, 1), capacity.train_alone(scenario, 1, "capacity"))


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory):
    """(number, results of every process) of one launch for all engines."""
    out = tmp_path_factory.mktemp("capacity")
    return request.param, torchrun(request.param, "capacity.py", out)


@slow
@pytest.mark.parametrize("engine", capacity.ENGINES)
@pytest.mark.parametrize("scenario", capacity.SCENARIOS)
def test_under_an_engine_it_ends_as_one_process_with_the_averaged_loss(processes, engine, scenario):
    number, results = processes
    first, *others = (result[engine][scenario] for result in results)
    assert_same(capacity.train_alone(scenario, number), first)
    for other in others:
        assert other["history"] == first["history"]
        assert all(torch.equal(value, first["adapter"][key]) for key, value in other["adapter"].items())


@slow
@pytest.mark.parametrize("scenario", capacity.SCENARIOS)
@pytest.mark.parametrize("engine", capacity.RESUMED)
def test_a_checkpoint_after_a_growth_goes_on_bit_for_bit(processes, engine, scenario):
    _, results = processes
    first = results[0][engine][scenario]
    resumed = first["resumed"]
    assert min(row[0] for row in first["history"]) <= capacity.STOP < first["history"][-1][0]
    assert resumed["history"] == first["history"]
    assert all(torch.equal(value, first["adapter"][key]) for key, value in resumed["adapter"].items())
