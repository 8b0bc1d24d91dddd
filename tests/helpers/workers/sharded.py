"""Run by torchrun: a base that fully_shard (FSDP2) shards over the processes, and an adapter that is left
whole; each process saves what it got.

Usage: sharded.py OUT [SCENARIO ...], where OUT/rank<N>.pt receives {scenario: result}.
"""

import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from growing import growing
from increlora_rs import IncreLoraConfig, adapter_parameters, attach
from launches import gloo, keep
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

STEPS, STOP = 24, 10
RESUMED = ("plain", "moving", "activation checkpoints", "with a head")
SCENARIOS = {
    "plain": {},
    "gathered until the backward pass": {"reshard_after_forward": False},
    "moving": {},
    "paper": {},
    "from nothing": {},
    "sensitivity": {},
    "accumulation": {},
    "accumulation without communication": {},
    "activation checkpoints": {},
    "CPU offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    "adapted after sharding": {},
    "loaded from a meta device": {},
    "with a head": {},
}
ADAPTED_AFTER = ("adapted after sharding", "loaded from a meta device")
# Of these one process has no like: what it multiplies is rounded.
ROUNDED = ("bfloat16",)
_FORMS = {
    "from nothing": {"init_r": 0, "importance_window": 2},
    "sensitivity": {"importance": "sensitivity"},
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(9, 12)
        self.blocks = nn.ModuleList(Block(12) for _ in range(2))
        self.head = nn.Linear(12, 6)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def config_for(scenario):
    targets = ["up", "down", "first"]
    if scenario == "moving":
        return IncreLoraConfig(r=2, lora_alpha=4, target_modules=targets, tinit=3, deltaT=3)
    make = IncreLoraConfig.paper if scenario == "paper" else growing
    settings = {"r": 2, "lora_alpha": 4, "target_modules": targets, "top_h": 2, "tinit": 3, "deltaT": 3}
    if scenario == "with a head":
        settings["modules_to_save"] = ["head"]
    return make(**settings | _FORMS.get(scenario, {}))


def model_for(scenario):
    torch.manual_seed(3)
    return peft.get_peft_model(Net(), config_for(scenario))


def shard(model, scenario, mesh=None):
    """Shards the base by block, and what is left over, over all processes or ``mesh``."""
    net = model.base_model.model if isinstance(model, peft.PeftModel) else model
    if scenario == "activation checkpoints":
        for k, block in enumerate(net.blocks):
            net.blocks[k] = checkpoint_wrapper(block)
    options = SCENARIOS[scenario] | {"mesh": mesh or init_device_mesh("cpu", (dist.get_world_size(),))}
    if isinstance(model, peft.PeftModel):
        options["ignored_params"] = adapter_parameters(model)
    for block in net.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)


def part(t, rank, micro):
    generator = torch.Generator().manual_seed(1000 * t + 10 * rank + micro)
    x = torch.randn(8, 9, generator=generator)
    return x, torch.sin(2 * x[:, :6])


def loss_of(model, t, rank, micro):
    x, y = part(t, rank, micro)
    return nn.functional.mse_loss(model(x).to(y.dtype), y)


def micro_batches(scenario):
    return 2 if scenario.startswith("accumulation") else 1


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def result(model, scheduler):
    return {
        "parameters": [p.detach().clone() for p in trained(model)],
        "ranks": scheduler.ranks,
        "history": [tuple(row) for row in scheduler.history.tolist()],
    }


def optimizer_of(model, scenario="plain"):
    # What moves first, at step 3, is judged at step 12: it pays where it has learned by then, and more moves.
    return torch.optim.AdamW(trained(model), lr=1e-1 if scenario == "moving" else 1e-2)


def loaded(whole, rank):
    """A base that no process but the first ever has whole."""
    with torch.device("meta"):
        net = Net()
    shard(net, "loaded from a meta device")
    net.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(net, {} if rank else whole.state_dict(), options=options)
    return net


def build(scenario, rank):
    if scenario in ADAPTED_AFTER:
        torch.manual_seed(3)
        if scenario == "loaded from a meta device":
            net = loaded(Net(), rank)
        else:
            net = Net()
            shard(net, scenario)
        # Each process draws others; the first one's count.
        torch.manual_seed(3 + rank)
        Net()
        return peft.get_peft_model(net, config_for(scenario))
    model = model_for(scenario)
    if rank:
        with torch.no_grad():
            trained(model)[0].normal_()
    shard(model, scenario)
    return model


def train(scenario, model, optimizer, scheduler, rank, last):
    micro = micro_batches(scenario)
    # What fully_shard was called on last.
    root = model.base_model.model if scenario in ADAPTED_AFTER else model
    for t in range(scheduler.step + 1, last + 1):
        for m in range(micro):
            if scenario == "accumulation without communication":
                root.set_requires_gradient_sync(m == micro - 1)
            (loss_of(model, t, rank, m) / micro).backward()
        clip_grad_norm_(trained(model), 0.2)
        optimizer.step()
        optimizer.zero_grad()


def train_here(scenario, rank):
    model = build(scenario, rank)
    assert all(isinstance(p, DTensor) for p in model.parameters() if not p.requires_grad)
    optimizer = optimizer_of(model, scenario)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    train(scenario, model, optimizer, scheduler, rank, STEPS)
    scheduler.detach()
    return result(model, scheduler)


def train_in_two_parts(scenario, rank, folder):
    """The first process saves in the middle, while the others wait, and all go on from its files."""
    model = build(scenario, rank)
    optimizer = optimizer_of(model, scenario)
    train(scenario, model, optimizer, attach(model, optimizer, total_steps=STEPS), rank, STOP)
    if rank == 0:
        model.save_pretrained(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    dist.barrier()
    torch.manual_seed(3)
    model = peft.PeftModel.from_pretrained(Net(), folder, is_trainable=True)
    shard(model, scenario)
    optimizer = optimizer_of(model, scenario)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    train(scenario, model, optimizer, scheduler, rank, STEPS)
    scheduler.detach()
    return result(model, scheduler)


def train_alone(scenario, processes):
    """One process that sees every process's batches, as micro-batches of the averaged loss."""
    model = model_for(scenario)
    optimizer = optimizer_of(model, scenario)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    micro = micro_batches(scenario)
    for t in range(1, STEPS + 1):
        for rank in range(processes):
            for m in range(micro):
                (loss_of(model, t, rank, m) / (micro * processes)).backward()
        clip_grad_norm_(trained(model), 0.2)
        optimizer.step()
        optimizer.zero_grad()
    scheduler.detach()
    return result(model, scheduler)


def main():
    with gloo() as rank:
        results = {}
        for scenario in sys.argv[2:] or SCENARIOS:
            results[scenario] = train_here(scenario, rank)
            if scenario in RESUMED:
                folder = Path(sys.argv[1]) / scenario.replace(" ", "_")
                results[scenario]["resumed"] = train_in_two_parts(scenario, rank, folder)
        keep(results, rank)


if __name__ == "__main__":
    main()
