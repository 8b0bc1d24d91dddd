"""Run by torchrun: trains under DistributedDataParallel in several ways; each process saves what it got.

Usage: ddp.py OUT, where OUT/rank<N>.pt receives {scenario: result}.
"""

import peft
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, attach, keep_average
from launches import gloo, keep
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

STEPS = 60
TARGETS = ["0", "2", "4"]
SCENARIOS = {
    "plain": {},
    "paper": {},
    "attach before wrapping": {},
    "accumulation": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "bucket view": {"gradient_as_bucket_view": True},
    "comm hook": {},
    "gradient": {},
    "dora": {},
    "from nothing": {},
    "from nothing, static graph": {"static_graph": True},
    "from nothing, bucket view": {"gradient_as_bucket_view": True},
}


def model_for(scenario):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 11), nn.Tanh(), nn.Linear(11, 6))
    make = IncreLoraConfig.paper if scenario == "paper" else growing
    options = {"importance": "gradient"} if scenario == "gradient" else {}
    if scenario.startswith("from nothing"):
        options = {"init_r": 0, "importance_window": 2}
    if scenario == "dora":
        options = {"use_dora": True}
    config = make(r=3, lora_alpha=6, target_modules=TARGETS, top_h=1, deltaT=5, **options)
    # In float64, so that only the method, not rounding, can make several processes differ from one.
    return peft.get_peft_model(model, config).double()


def part(t, rank, micro=0):
    generator = torch.Generator().manual_seed(1000 * t + 10 * rank + micro)
    x = torch.randn(8, 9, generator=generator, dtype=torch.float64)
    return x, torch.sin(2 * x[:, :6])


def loss_of(model, t, rank, micro=0):
    x, y = part(t, rank, micro)
    return nn.functional.mse_loss(model(x), y)


def micro_batches(scenario):
    return 2 if scenario == "accumulation" else 1


def result(model, scheduler):
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
        "ranks": scheduler.ranks,
        "history": scheduler.history.tolist(),
    }


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train_here(scenario, rank):
    model = model_for(scenario)
    # Seeds that differ must not make the processes draw different components.
    torch.manual_seed(100 + rank)
    optimizer = optimizer_of(model)
    if scenario == "attach before wrapping":
        scheduler = attach(model, optimizer, total_steps=STEPS)
    ddp = DistributedDataParallel(model, **SCENARIOS[scenario])
    if scenario == "comm hook":
        ddp.register_comm_hook(None, allreduce_hook)
    if scenario != "attach before wrapping":
        scheduler = attach(ddp, optimizer, total_steps=STEPS)
    averaged, events = AveragedModel(ddp), []
    keep_average(scheduler, averaged)
    scheduler.on_growth(lambda event: events.append((event.step, [resize.name for resize in event.resizes])))
    micro = micro_batches(scenario)
    for t in range(1, STEPS + 1):
        for m in range(micro - 1):
            with ddp.no_sync():
                (loss_of(ddp, t, rank, m) / micro).backward()
        (loss_of(ddp, t, rank, micro - 1) / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(ddp)
    average = {name: p.detach().clone() for name, p in averaged.named_parameters()}
    return result(model, scheduler) | {"events": events, "average": average}


def train_alone(scenario, processes):
    """One process that sees every process's batches, as micro-batches of the averaged loss."""
    model = model_for(scenario)
    torch.manual_seed(100)
    optimizer = optimizer_of(model)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    micro = micro_batches(scenario)
    for t in range(1, STEPS + 1):
        for rank in range(processes):
            for m in range(micro):
                (loss_of(model, t, rank, m) / (micro * processes)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(model, scheduler)


def main():
    with gloo() as rank:
        keep({scenario: train_here(scenario, rank) for scenario in SCENARIOS}, rank)


if __name__ == "__main__":
    main()
