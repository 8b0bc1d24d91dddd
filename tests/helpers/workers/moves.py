"""Run by torchrun: components move between modules under DistributedDataParallel; each process saves its end.

Usage: moves.py OUT, where OUT/rank<N>.pt receives {way: result}.
"""

import torch
from increlora_rs import attach, keep_average
from launches import gloo, keep
from moving import STEPS, Moving, adamw, adapted, trainable
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

WAYS = {"plain": {}, "static graph": {"static_graph": True}, "bucket view": {"gradient_as_bucket_view": True}}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.lin0, self.lin1 = nn.Linear(12, 20), nn.Linear(20, 6)

    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(x)))


def loss_of(model, t, rank):
    generator = torch.Generator().manual_seed(1000 * t + rank)
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    return (model(x) - x[:, :6].sin()).square().mean()


def result(model, scheduler):
    return {"parameters": [p.detach().clone() for p in trainable(model)], "ranks": scheduler.ranks}


def train_here(way, rank):
    # In float64, so that only the method, not rounding, can make several processes differ from one.
    model = adapted(Plain).double()
    torch.manual_seed(100 + rank)
    optimizer = adamw(model)
    net = DistributedDataParallel(model, **WAYS[way])
    scheduler = attach(net, optimizer, policy=Moving)
    average = AveragedModel(net)
    keep_average(scheduler, average)
    for t in range(1, STEPS + 1):
        loss_of(net, t, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(net)
    return result(model, scheduler) | {"average": [p.detach().clone() for p in average.parameters()]}


def train_alone(processes):
    """One process that sees every process's batches, as micro-batches of the averaged loss."""
    model = adapted(Plain).double()
    torch.manual_seed(100)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, policy=Moving)
    for t in range(1, STEPS + 1):
        for rank in range(processes):
            (loss_of(model, t, rank) / processes).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(model, scheduler)


def main():
    with gloo() as rank:
        keep({way: train_here(way, rank) for way in WAYS}, rank)


if __name__ == "__main__":
    main()
