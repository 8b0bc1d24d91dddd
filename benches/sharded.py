"""What a process holds of a model whose base is sharded, beside DistributedDataParallel's.

    python -m benches.sharded [PROCESSES]

Of each way, each in processes of its own: the bytes of its base weights, and of what is trained with the
optimizer's state, between steps; and by how much the process's peak in training steps is above what it had
before the model was made. CPU, gloo.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from increlora_rs import IncreLoraConfig, adapter_parameters, attach
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

_WAYS = ("DDP", "FSDP2", "FSDP1")
_WIDTH, _BLOCKS, _STEPS = 1024, 8, 4


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.down(torch.tanh(self.up(x)))
        return x + update


def _status(name: str) -> int:
    """A line of the process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _local(tensor: Tensor) -> int:
    whole = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return whole.numel() * whole.element_size()


def _wrapped(way: str, model: nn.Module) -> nn.Module:
    if way == "DDP":
        return DistributedDataParallel(model)
    if way == "FSDP1":
        policy = ModuleWrapPolicy({_Block})
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = adapter_parameters(model)
    for block in (each for each in model.modules() if isinstance(each, _Block)):
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    return model


def measure(way: str) -> tuple[int, int, int]:
    """Bytes of the base, of what is trained with its optimizer's state, and of the peak."""
    gc.collect()
    before = _status("VmRSS")
    torch.manual_seed(0)
    config = IncreLoraConfig(
        r=8,
        max_r=16,
        target_modules=["up", "down"],
        total_step=_STEPS,
        growth="capacity" if way == "FSDP1" else "resize",
    )
    wrapped = _wrapped(way, peft.get_peft_model(nn.Sequential(*(_Block() for _ in range(_BLOCKS))), config))
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    scheduler = attach(wrapped, optimizer)
    # From here on: the whole base was there while it was made.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    for step in range(_STEPS):
        x = torch.randn(64, _WIDTH, generator=torch.Generator().manual_seed(step))
        wrapped(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = _status("VmHWM") - before
    scheduler.detach()
    base = sum(_local(parameter) for parameter in wrapped.parameters() if not parameter.requires_grad)
    state = [value for of in optimizer.state.values() for value in of.values() if isinstance(value, Tensor)]
    return base, sum(map(_local, trained)) + sum(map(_local, state)), peak


def _work(way: str) -> None:
    """One process of a way; the first one prints its figures."""
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    # M_MMAP_THRESHOLD: what is freed goes back to the system at once, and does not count for the peak.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    dist.init_process_group("gloo")
    found = measure(way)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main(processes: int) -> None:
    """Measures every way and prints the first process's figures."""
    found = {}
    for way in _WAYS:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "-m", "benches.sharded", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    of_ddp = found["DDP"]
    print(f"{processes} processes         base  of DDP  trained, state          peak  of DDP")
    for way, (base, trained, peak) in found.items():
        print(
            f"{way:<8} {base / 2**20:13.1f} MiB {base / of_ddp[0]:6.2f} {trained / 2**20:11.1f} MiB "
            f"{peak / 2**20:9.1f} MiB {peak / of_ddp[2]:6.2f}"
        )


if __name__ == "__main__":
    if "RANK" in os.environ:
        _work(sys.argv[1])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
