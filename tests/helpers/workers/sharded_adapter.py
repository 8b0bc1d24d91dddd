"""Run by torchrun: an adapter in the capacity form that fully_shard (FSDP2) cuts with its block; each process
saves what it got.

Usage: sharded_adapter.py OUT [WAY ...], where OUT/rank<N>.pt receives {way: {scenario: result}}.
"""

import copy
import sys
from pathlib import Path

import capacity
import peft
import torch
import torch.distributed as dist
from capacity import config_for
from increlora_rs import attach
from launches import gloo, keep
from sharded import STEPS, STOP, Net, loss_of, trained
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

FULL = StateDictOptions(full_state_dict=True)
# Ways to shard, with what fully_shard is told.
WAYS = {
    "plain": {},
    "gathered until the backward pass": {"reshard_after_forward": False},
    "kept gathered after it": {},
    "replicas": {},
    "activation checkpoints": {},
    "CPU offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    "accumulation": {},
    "accumulation without communication": {},
    "foreach": {},
    "with a head": {},
    "with a whole head": {},
}
RESUMED = ("plain", "replicas", "with a head")
# What is in reserve is not saved.
FROM_FILES = ("growing", "moving")
# Of these one process has no like: what it multiplies is rounded.
ROUNDED = ("bfloat16",)


def scenarios(way):
    """What is trained in a way."""
    return tuple(capacity.SCENARIOS) if way == "plain" else ("growing", "moving")


def model_for(scenario, way, growth="capacity"):
    config = config_for(scenario, growth)
    if "head" in way:
        config.modules_to_save = ["head"]
    return capacity.model_of(config)


def sharded(model, way):
    net = model.base_model.model
    if way == "activation checkpoints":
        for k, block in enumerate(net.blocks):
            net.blocks[k] = checkpoint_wrapper(block)
    options, number = dict(WAYS[way]), dist.get_world_size()
    if way == "replicas":
        shards = 2 if number == 4 else 1
        options["mesh"] = init_device_mesh(
            "cpu", (number // shards, shards), mesh_dim_names=("copies", "rows")
        )
    else:
        options["mesh"] = init_device_mesh("cpu", (number,))
    if way == "with a whole head":
        options["ignored_params"] = {p for p in net.head.parameters() if p.requires_grad}
    for block in net.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def optimizer_of(model, scenario, way):
    return torch.optim.AdamW(
        trained(model), lr=1e-1 if scenario == "moving" else 1e-2, foreach=way == "foreach"
    )


def begun(scenario, way):
    model = sharded(model_for(scenario, way), way)
    assert all(isinstance(p, DTensor) for name, p in model.named_parameters() if "lora_" in name)
    optimizer = optimizer_of(model, scenario, way)
    return model, optimizer, attach(model, optimizer, total_steps=STEPS)


def clip(optimizer, way):
    # torch takes no norm over what is cut and what is whole.
    if way != "with a whole head":
        clip_grad_norm_(optimizer.param_groups[0]["params"], 0.2)


def micro_batches(way):
    return 2 if way.startswith("accumulation") else 1


def train(model, optimizer, scheduler, rank, last, way):
    micro = micro_batches(way)
    for t in range(scheduler.step + 1, last + 1):
        if way == "kept gathered after it" and t % 4 == 1:
            # The root, and here the blocks, stay gathered where no backward pass comes.
            with torch.no_grad():
                loss_of(model, t, rank, 7)
            for block in model.base_model.model.blocks:
                block.unshard()
        for m in range(micro):
            if way == "accumulation without communication":
                model.set_requires_gradient_sync(m == micro - 1)
            if way == "kept gathered after it":
                model.set_reshard_after_backward(t % 2 == 0)
            (loss_of(model, t, rank, m) / micro).backward()
        clip(optimizer, way)
        optimizer.step()
        optimizer.zero_grad()


def result(model, scheduler):
    state = get_model_state_dict(model, options=FULL) if dist.is_initialized() else model.state_dict()
    names = ("lora_", "modules_to_save")
    return {
        "adapter": {key: value.clone() for key, value in state.items() if any(n in key for n in names)},
        "ranks": scheduler.ranks,
        "history": [tuple(row) for row in scheduler.history.tolist()],
    }


def train_here(scenario, way, rank):
    model, optimizer, scheduler = begun(scenario, way)
    train(model, optimizer, scheduler, rank, STEPS, way)
    scheduler.detach()
    return result(model, scheduler)


def train_in_two_parts(scenario, way, rank):
    """By whole state dicts, into a fresh model."""
    model, optimizer, scheduler = begun(scenario, way)
    train(model, optimizer, scheduler, rank, STOP, way)
    saved = copy.deepcopy(get_state_dict(model, optimizer, options=FULL))
    model, optimizer, scheduler = begun(scenario, way)
    set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=FULL)
    train(model, optimizer, scheduler, rank, STEPS, way)
    scheduler.detach()
    return result(model, scheduler)


def train_from_files(scenario, way, rank, folder):
    """By what the first process saved of the gathered values, and one of the optimizer's."""
    model, optimizer, scheduler = begun(scenario, way)
    train(model, optimizer, scheduler, rank, STOP, way)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    if rank == 0:
        model.save_pretrained(folder, state_dict=of_model)
        torch.save(of_optimizer, folder / "optimizer.pt")
    dist.barrier()
    config = model_for(scenario, way).peft_config["default"]
    torch.manual_seed(3)
    model = peft.PeftModel.from_pretrained(Net(), folder, is_trainable=True, config=config)
    sharded(model, way)
    optimizer = optimizer_of(model, scenario, way)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    of_optimizer = torch.load(folder / "optimizer.pt")
    set_state_dict(model, optimizer, model_state_dict={}, optim_state_dict=of_optimizer, options=FULL)
    train(model, optimizer, scheduler, rank, STEPS, way)
    scheduler.detach()
    return result(model, scheduler)


def train_alone(scenario, way, processes):
    """One process that sees every process's batches, as micro-batches of the averaged loss."""
    model = model_for(scenario, way, "resize")
    optimizer = optimizer_of(model, scenario, way)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    micro = micro_batches(way)
    for t in range(1, STEPS + 1):
        for rank in range(processes):
            for m in range(micro):
                (loss_of(model, t, rank, m) / (micro * processes)).backward()
        clip(optimizer, way)
        optimizer.step()
        optimizer.zero_grad()
    scheduler.detach()
    return result(model, scheduler)


def main():
    with gloo() as rank:
        results = {}
        for way in sys.argv[2:] or WAYS:
            results[way] = {scenario: train_here(scenario, way, rank) for scenario in scenarios(way)}
            for scenario in scenarios(way):
                if way in RESUMED:
                    results[way][scenario]["resumed"] = train_in_two_parts(scenario, way, rank)
                if way == "plain" and scenario in FROM_FILES:
                    folder = Path(sys.argv[1]) / scenario.replace(" ", "_")
                    from_files = train_from_files(scenario, way, rank, folder)
                    results[way][scenario]["from files"] = from_files
        keep(results, rank)


if __name__ == "__main__":
    main()
