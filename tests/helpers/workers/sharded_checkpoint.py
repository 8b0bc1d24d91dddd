"""Run by torchrun: a base that FSDP2 shards is saved by torch.distributed.checkpoint after a growth, and
loaded into a fresh one in another number of processes.

Usage: sharded_checkpoint.py OUT save|load, where OUT/checkpoint is the checkpoint, and OUT/rank<N>.pt gets
what each process has after it.
"""

import sys
from pathlib import Path

import torch.distributed.checkpoint as dcp
from increlora_rs import attach, load_checkpoint
from launches import gloo, keep
from sharded import STEPS, STOP, build, optimizer_of, result, train, trained
from torch.distributed.checkpoint.state_dict import get_state_dict


def main():
    folder, way = Path(sys.argv[1]) / "checkpoint", sys.argv[2]
    with gloo() as rank:
        model = build("plain", rank)
        optimizer = optimizer_of(model)
        scheduler = attach(model, optimizer, total_steps=STEPS)
        if way == "save":
            train("plain", model, optimizer, scheduler, rank, STOP)
            of_model, of_optimizer = get_state_dict(model, optimizer)
            dcp.save({"model": of_model, "optim": of_optimizer}, checkpoint_id=folder)
        else:
            load_checkpoint(model, folder, optimizer)
        moments = [optimizer.state[p]["exp_avg"].clone() for p in trained(model)]
        keep(result(model, scheduler) | {"moments": moments}, rank)


if __name__ == "__main__":
    main()
