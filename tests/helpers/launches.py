"""Processes that torchrun starts: how a test launches workers, and what stands around a worker's own work."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

WORKERS = Path(__file__).parent / "workers"


def torchrun(processes, script, out, *arguments, timeout=600, weights_only=True):
    """Runs ``workers/script out arguments`` in so many processes; what each of them saved in ``out``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", str(WORKERS / script), str(out), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)
    # The first lines name the error of the process that failed first, the last ones torchrun's own.
    assert done.returncode == 0, f"{done.stderr[:3000]}\n...\n{done.stderr[-3000:]}"
    return kept(out, processes, weights_only=weights_only)


def environment():
    """That of a worker's process."""
    paths = os.pathsep.join([str(WORKERS.parent), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}


def kept(out, processes, *, weights_only=True):
    """What each process saved in ``out``."""
    return [torch.load(out / f"rank{k}.pt", weights_only=weights_only) for k in range(processes)]


@contextmanager
def gloo():
    """The group of a worker's processes, of one thread each; gives the process's number."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    yield dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()


def keep(results, rank):
    """Saves what this process got in the folder that is the worker's first argument."""
    torch.save(results, Path(sys.argv[1]) / f"rank{rank}.pt")
