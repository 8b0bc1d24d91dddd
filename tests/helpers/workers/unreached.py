"""Run by torchrun: modules that only the last process calls, or none; each process saves what it got.

Usage: unreached.py OUT, where OUT/rank<N>.pt receives {importance: (ranks, warnings)}.
"""

import warnings

import torch
import torch.distributed as dist
from growing import growing
from increlora_rs import attach
from launches import gloo, keep
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.all, self.some, self.none = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x, is_last):
        y = torch.tanh(self.all(x))
        return self.some(y) if is_last else y


def train(importance):
    torch.manual_seed(0)
    config = growing(r=3, target_modules=["all", "some", "none"], importance=importance)
    model = get_peft_model(Routed(), config)
    net = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = attach(net, optimizer, total_steps=20)
    is_last = dist.get_rank() == dist.get_world_size() - 1
    torch.manual_seed(dist.get_rank())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(20):
            net(torch.randn(4, 12), is_last).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return scheduler.ranks, [str(one.message) for one in told if "no gradient" in str(one.message)]


def main():
    with gloo() as rank:
        keep({importance: train(importance) for importance in ("gradient", "sensitivity")}, rank)


if __name__ == "__main__":
    main()
