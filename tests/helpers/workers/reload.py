"""Run by torchrun: an earlier adapter of smaller ranks is loaded in the middle of a training; each process
saves its parameters.

Usage: reload.py OUT, where OUT/rank<N>.pt receives (parameters, ranks).
"""

import copy

import torch
import torch.distributed as dist
from growing import growing
from increlora_rs import attach
from launches import gloo, keep
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train():
    torch.manual_seed(0)
    config = growing(r=3, target_modules=["0", "2"])
    model = get_peft_model(nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)), config)
    net = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = attach(net, optimizer, total_steps=40)
    early = copy.deepcopy(net.state_dict())
    torch.manual_seed(dist.get_rank())
    for step in range(40):
        if step == 20:
            net.load_state_dict(early)
        net(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters() if p.requires_grad], scheduler.ranks


def main():
    with gloo() as rank:
        keep(train(), rank)


if __name__ == "__main__":
    main()
