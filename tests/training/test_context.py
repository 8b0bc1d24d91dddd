"""Context parallelism: processes that have a part of each sequence end as one that has it whole."""

import sys

import pytest
import torch
from launches import WORKERS, torchrun

sys.path.insert(0, str(WORKERS))

import context

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes got of each way."""
    return torchrun(2, "context.py", tmp_path_factory.mktemp("context"))


@pytest.mark.parametrize("way", context.WAYS)
def test_processes_with_parts_of_each_sequence_are_alike_and_equal_one_with_the_whole(processes, way):
    first, second = (result[way] for result in processes)
    alone = context.train_alone(way)
    assert first["history"] == second["history"] != []
    assert first["ranks"] == alone["ranks"]
    assert [row[:3] for row in first["history"]] == [row[:3] for row in alone["history"]]
    for one, other, parameter in zip(
        first["parameters"], second["parameters"], alone["parameters"], strict=True
    ):
        assert torch.equal(one, other)
        assert (one - parameter).norm() <= 1e-4 * parameter.norm()
