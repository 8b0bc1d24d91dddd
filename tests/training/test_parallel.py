"""Tensor and pipeline parallelism, and a sharding over some of the processes, are refused by name."""

import sys

import pytest
import torch
from launches import WORKERS, torchrun

sys.path.insert(0, str(WORKERS))

pytestmark = pytest.mark.slow

REFUSED = {
    "tensor, adapted after": ["'blocks.1.up' is split over a mesh of 2", "tensor parallelism"],
    "tensor, adapted before": ["'blocks.1.up' is split over a mesh of 2", "tensor parallelism"],
    "pipeline": ["process 0 has 3, 'first' the first, and process 1 has 2", "pipeline parallelism"],
    "sharded over some": ["over a mesh of 1 processes, and the process group has 2"],
}


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """What two processes got of each way."""
    return torchrun(2, "parallel.py", tmp_path_factory.mktemp("parallel"))


@pytest.mark.parametrize("way", REFUSED)
def test_it_is_refused_in_all_processes_alike(ways, way):
    first, second = (result[way] for result in ways)
    assert first == second
    assert all(said in first for said in REFUSED[way])


def test_an_adapter_beside_what_is_split_works(ways):
    first, second = (result["tensor, beside the adapter"] for result in ways)
    assert first["ranks"] == second["ranks"]
    assert max(first["ranks"].values()) > 1
    assert all(map(torch.equal, first["parameters"], second["parameters"]))
