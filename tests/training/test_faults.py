"""A process that has a NaN alone is named before ranks are decided; one that is killed ends the others, and
the last checkpoint goes on bit for bit."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from launches import WORKERS, torchrun

sys.path.insert(0, str(WORKERS))

import faults

pytestmark = pytest.mark.slow


def test_a_nan_in_one_process_alone_is_named_before_anything_is_decided(tmp_path):
    first, second = torchrun(2, "faults.py", tmp_path, "broken")
    assert first == second
    for found in first.values():
        assert "NaN or infinite in process 1 of 2 alone" in found["error"]
        assert "'first'" in found["error"]
        # The schedules' events after the NaN, which is in step 8, are of steps 9 and 8.
        assert found["step"] <= 8


def two(out, *arguments):
    """Starts two processes by themselves, for torchrun ends the other where one is killed; their codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(WORKERS.parent), os.environ.get("PYTHONPATH", "")])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": paths}
    command = [sys.executable, str(WORKERS / "faults.py"), str(out), *arguments]
    started = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "OMP_NUM_THREADS": "1"})
        for rank in range(2)
    ]
    return [process.wait(timeout=600) for process in started]


def test_a_killed_process_ends_the_other_and_the_last_checkpoint_goes_on_bit_for_bit(tmp_path):
    for when in faults.WHEN:
        ours, killed = two(tmp_path, "killed", when)
        assert killed < 0 == ours, when
        waited = torch.load(tmp_path / "rank0.pt")
        assert waited["error"]
        assert waited["seconds"] < 2 * faults.PATIENCE
    for result in torchrun(2, "faults.py", tmp_path, "whole"):
        whole = result["whole"]
        assert min(row[0] for row in whole["history"]) <= faults.STOP < whole["history"][-1][0]
        for when, resumed in result["resumed"].items():
            assert resumed["history"] == whole["history"], when
            assert all(map(torch.equal, resumed["parameters"], whole["parameters"])), when
