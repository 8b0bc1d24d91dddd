"""Run in two processes: one of them has a NaN alone, or is killed; each saves what came of it.

Usage: faults.py OUT broken | killed WHEN | whole, where OUT/rank<N>.pt receives what each process got, and
OUT/WHEN.pt is the last checkpoint before the process was killed.
"""

import datetime
import os
import signal
import sys
import time
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from increlora_rs import attach
from increlora_rs.training.modules import AdaptedModule
from launches import keep
from sharded import STEPS, STOP, Net, config_for, loss_of, trained
from torch.nn.parallel import DistributedDataParallel

# When a process is killed: in a window between growths, when components are chosen and none has grown in all
# modules yet, while the state is saved.
WHEN = ("in a window", "in a growth", "at a save")
# Seconds until a process that waits for another gives up.
PATIENCE = 30
# The step of the kill: the schedule's events are at multiples of 3.
_LAST = {"in a window": 11, "in a growth": 12, "at a save": 11}


def begin(scenario="plain"):
    torch.manual_seed(3)
    model = peft.get_peft_model(Net(), config_for(scenario))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    return model, wrapped, optimizer, attach(model, optimizer, total_steps=STEPS)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def train(wrapped, optimizer, scheduler, last, rank, before_step=lambda t: None):
    for t in range(scheduler.step + 1, last + 1):
        loss_of(wrapped, t, rank, 0).backward()
        before_step(t)
        optimizer.step()
        optimizer.zero_grad()


def broken(scenario, rank):
    """The error of a NaN in the second process alone, in the step of an event, and the step that it is in."""
    model, wrapped, optimizer, scheduler = begin(scenario)

    def break_one(t):
        if rank == 1 and t == 8:
            trained(model)[2].grad[0] = torch.nan

    try:
        train(wrapped, optimizer, scheduler, STEPS, rank, break_one)
    except ValueError as error:
        return {"error": str(error), "step": scheduler.step}
    return None


def save(model, optimizer, path):
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def killed(when, rank, folder):
    """How long the first process waited for the second one, which was killed, and the error."""
    model, wrapped, optimizer, scheduler = begin()
    train(wrapped, optimizer, scheduler, STOP, rank)
    if rank == 0:
        save(model, optimizer, folder / f"{when}.pt")
    dist.barrier()
    train(wrapped, optimizer, scheduler, _LAST[when] - 1, rank)
    if rank == 1 and when == "in a growth":
        grow = AdaptedModule.grow
        AdaptedModule.grow = lambda self, *rest: (grow(self, *rest), die())
    elif rank == 1 and when == "in a window":
        trained(model)[0].register_hook(lambda _: die())
    elif rank == 1:
        optimizer.register_state_dict_post_hook(lambda *_: die())
    begun = time.monotonic()
    try:
        train(wrapped, optimizer, scheduler, _LAST[when], rank)
        optimizer.state_dict()
        train(wrapped, optimizer, scheduler, STEPS, rank)
    except RuntimeError as error:
        return {"error": str(error), "seconds": time.monotonic() - begun}
    return None


def ended(model, scheduler):
    return {
        "parameters": [p.detach().clone() for p in trained(model)],
        "history": scheduler.history.tolist(),
    }


def resumed(path, rank):
    model, wrapped, optimizer, scheduler = begin()
    saved = torch.load(path)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(wrapped, optimizer, scheduler, STEPS, rank)
    return ended(model, scheduler)


def whole(rank):
    model, wrapped, optimizer, scheduler = begin()
    train(wrapped, optimizer, scheduler, STEPS, rank)
    return ended(model, scheduler)


def main():
    folder, way = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE))
    rank = dist.get_rank()
    if way == "broken":
        keep({scenario: broken(scenario, rank) for scenario in ("plain", "moving")}, rank)
    elif way == "killed":
        keep(killed(sys.argv[3], rank, folder), rank)
        # Its peer is gone, and destroying the group would wait for it.
        os._exit(0)
    else:
        again = {when: resumed(folder / f"{when}.pt", rank) for when in WHEN}
        keep({"whole": whole(rank), "resumed": again}, rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
