"""Run by torchrun on two nodes: trainings whose ranks grow and move; each process saves what it got.

Usage: on_nodes.py OUT, where OUT/rank<N>.pt receives {way: result}.
"""

import os

import capacity
import ddp
import sharded
from launches import gloo, keep

# By way the script, and its scenario.
WAYS = {
    "DDP, growing": (ddp, "plain"),
    "DDP, by sketches": (ddp, "gradient"),
    "FSDP2, moving": (sharded, "moving"),
    "FSDP1, growing": (capacity, "growing"),
}


def train_here(way, rank):
    script, scenario = WAYS[way]
    return script.train_here(scenario, *(["FSDP1"] if script is capacity else []), rank)


def main():
    with gloo() as rank:
        results = {way: train_here(way, rank) for way in WAYS}
        keep(results | {"network": os.readlink("/proc/self/ns/net")}, rank)


if __name__ == "__main__":
    main()
