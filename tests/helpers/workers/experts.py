"""Run by torchrun: experts under DistributedDataParallel, of which each process sees others; OUT/rank<N>.pt
receives what it trained, and process 0's also what one process trains that sees all batches."""

import torch
from adapted_experts import adapted, layers_of, optimizer_of
from increlora_rs import attach
from launches import gloo, keep
from torch.nn.parallel import DistributedDataParallel

STEPS, PROCESSES = 10, 2


def loss_of(model, step, rank):
    # One token: two of four experts see it.
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(0, 99, (1, 1), generator=generator)
    return model(input_ids=tokens, use_cache=False).logits.logsumexp(-1).mean()


def result(model, scheduler):
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"state": state, "ranks": scheduler.ranks}


def begin():
    model = adapted("Qwen3Moe").train()
    return model, optimizer_of(model)


def train_here(rank):
    model, optimizer = begin()
    seen = set()
    for number in range(STEPS):
        loss_of(model, number, rank).backward()
        seen |= {
            (number, name)
            for name, layer in layers_of(model).items()
            if "experts" in name and layer.factors("default")[1].grad.any()
        }
        optimizer.zero_grad()
    net = DistributedDataParallel(model)
    scheduler = attach(net, optimizer, total_steps=STEPS)
    for number in range(STEPS):
        loss_of(net, number, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(model, scheduler) | {"seen": seen}


def train_alone():
    model, optimizer = begin()
    # Of one process: nobody averages.
    scheduler = attach(model, optimizer, total_steps=STEPS)
    for number in range(STEPS):
        for rank in range(PROCESSES):
            (loss_of(model, number, rank) / PROCESSES).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(model, scheduler)


def main():
    alone = train_alone()
    with gloo() as rank:
        keep(train_here(rank) | {"alone": alone}, rank)


if __name__ == "__main__":
    main()
