"""Averages of an adapter of which each process has a piece follow ranks as those of one process do."""

import sys

import pytest
import torch
from launches import WORKERS, torchrun

sys.path.insert(0, str(WORKERS))

import averaged_pieces as worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory):
    """(number, results of every process)."""
    out = tmp_path_factory.mktemp("averaged_pieces")
    return request.param, torchrun(request.param, "averaged_pieces.py", out, timeout=1200)


@pytest.mark.parametrize(("engine", "scenario", "holder"), worker.CASES)
def test_an_average_in_pieces_is_that_of_one_process(processes, engine, scenario, holder):
    number, results = processes
    alone = worker.train_alone(scenario, holder, number)
    for result in results:
        found = result[engine, scenario, holder]
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
            # Rows that do not count are 0 in both.
            for dim in range(2):
                assert torch.equal(found[name].ne(0).any(dim), value.ne(0).any(dim))


def test_what_is_a_part_of_something_else_is_refused_by_name_and_what_is_whole_is_not(processes):
    _, results = processes
    for result in results:
        assert set(result["refusals"]) == {"state dict", "flat"}
        for told in result["refusals"].values():
            assert "Give copies of model.parameters() as they are in each process" in told
