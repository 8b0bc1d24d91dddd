"""Run by torchrun: trains a compiled model under DistributedDataParallel; each process saves what it got.

Usage: compiled.py OUT, where OUT/rank<N>.pt receives {way: result}.
"""

import torch
from ddp import STEPS, loss_of, model_for, optimizer_of, result
from increlora_rs import attach
from launches import gloo, keep
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel


def train(way, rank):
    torch._dynamo.reset()
    model = model_for("plain")
    torch.manual_seed(100 + rank)
    counter = CompileCounterWithBackend("aot_eager")
    if way == "compiled, then wrapped":
        net = DistributedDataParallel(torch.compile(model, backend=counter))
    elif way == "wrapped, then compiled":
        net = torch.compile(DistributedDataParallel(model), backend=counter)
    else:
        net = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    scheduler = attach(net, optimizer, total_steps=STEPS)
    for t in range(1, STEPS + 1):
        loss_of(net, t, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(model, scheduler) | {"graphs": counter.frame_count}


def main():
    with gloo() as rank:
        ways = ("eager", "compiled, then wrapped", "wrapped, then compiled")
        keep({way: train(way, rank) for way in ways}, rank)


if __name__ == "__main__":
    main()
