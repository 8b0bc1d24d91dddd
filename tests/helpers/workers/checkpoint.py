"""Run by torchrun: trains under DistributedDataParallel, saves by torch.distributed.checkpoint, goes on.

Usage: checkpoint.py OUT, where OUT/dcp receives the checkpoint and OUT/rank<N>.pt {way of resuming: result}.
"""

import os
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from growing import growing
from increlora_rs import attach, load_checkpoint
from torch import nn
from torch.distributed.checkpoint import state_dict as api
from torch.nn.parallel import DistributedDataParallel

STOP, STEPS = 8, 20


def begin(wrap=True):
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    model = peft.get_peft_model(
        base, growing(r=3, lora_alpha=6, target_modules=["0", "2"], tinit=3, deltaT=3, top_h=1)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model = DistributedDataParallel(model) if wrap else model
    return model, optimizer, attach(model, optimizer, total_steps=STEPS)


def run(model, optimizer, first, last, rank):
    for t in range(first, last):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * t + rank))
        (model(x) - torch.sin(2 * x[:, :4])).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def parameters(model):
    inner = getattr(model, "module", model)
    return {name: p.detach().clone() for name, p in inner.named_parameters() if p.requires_grad}


def broadcast(model, optimizer, state, rank):
    options = api.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model_state, optimizer_state = state if rank == 0 else ({}, {})
    api.set_model_state_dict(model, model_state, options=options)
    api.set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)


def main(out):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, optimizer, _ = begin()
    run(model, optimizer, 0, STEPS, rank)
    results = {"whole": parameters(model)}

    model, optimizer, _ = begin()
    run(model, optimizer, 0, STOP, rank)
    results["saved"] = parameters(model)
    state = api.get_state_dict(model, optimizer)
    dcp.save({"model": state[0], "optim": state[1]}, checkpoint_id=out / "dcp")

    for way in ("load_checkpoint", "broadcast"):
        model, optimizer, _ = begin()
        if way == "broadcast":
            options = api.StateDictOptions(full_state_dict=True, cpu_offload=True)
            broadcast(model, optimizer, state_of_first(options, rank), rank)
        else:
            load_checkpoint(model, out / "dcp", optimizer)
        run(model, optimizer, STOP, STEPS, rank)
        results[way] = parameters(model)
    torch.save(results, out / f"rank{rank}.pt")
    dist.barrier()
    # The end of a DDP may wait for ever for gloo's thread, which wants the GIL (torch 2.13).
    os._exit(0)


def state_of_first(options, rank):
    """The state of the run that was stopped, as the first process gathers it."""
    model, optimizer, _ = begin()
    run(model, optimizer, 0, STOP, rank)
    return api.get_state_dict(model, optimizer, options=options)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
