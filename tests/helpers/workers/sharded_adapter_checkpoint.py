"""Run by torchrun: an adapter that FSDP2 cuts with its block is saved by torch.distributed.checkpoint after a
growth, and loaded into a fresh one in another number of processes.

Usage: sharded_adapter_checkpoint.py OUT save|load, where OUT/checkpoint is the checkpoint, and OUT/rank<N>.pt
gets what each process has after it, whole.
"""

import sys
from pathlib import Path

import torch.distributed.checkpoint as dcp
from increlora_rs import load_checkpoint
from launches import gloo, keep
from sharded import STOP, trained
from sharded_adapter import begun, result, train
from torch.distributed.checkpoint.state_dict import get_state_dict

SCENARIOS = ("growing", "moving")


def main():
    way, results = sys.argv[2], {}
    with gloo() as rank:
        for scenario in SCENARIOS:
            folder = Path(sys.argv[1]) / scenario
            model, optimizer, scheduler = begun(scenario, "plain")
            if way == "save":
                train(model, optimizer, scheduler, rank, STOP, "plain")
                of_model, of_optimizer = get_state_dict(model, optimizer)
                dcp.save({"model": of_model, "optim": of_optimizer}, checkpoint_id=folder)
            else:
                load_checkpoint(model, folder, optimizer)
            moments = [optimizer.state[p]["exp_avg"].full_tensor() for p in trained(model)]
            results[scenario] = result(model, scheduler) | {"moments": moments}
        keep(results, rank)


if __name__ == "__main__":
    main()
