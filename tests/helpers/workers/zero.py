"""Run by torchrun: an adapter in the capacity form under DeepSpeed's engine, by the stages of ZeRO; each
process saves what it got.

Usage: zero.py OUT [ENGINE ...], where OUT/rank<N>.pt receives {engine: {scenario: result}}.
"""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import capacity
import deepspeed
import torch
import torch.distributed as dist
from increlora_rs import attach
from launches import gloo, keep
from sharded import STEPS, STOP, optimizer_of, part
from torch import nn
from zero_stages import ENGINES, SMALL

# Else it compiles a communication of its own for processes of one machine, for minutes.
deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)


def begun(scenario, name):
    # Without ZeRO parameters change their size under the engine, too.
    model = capacity.model_for(scenario, "resize" if name == "ZeRO 0" else "capacity")
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.2,
        "zero_optimization": ENGINES[name][0] | SMALL,
        "bf16": {"enabled": "bfloat16" in name},
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer_of(model, scenario), config=config)[0]
    return engine, attach(engine, engine.optimizer, total_steps=STEPS)


def train(engine, scheduler, rank, last):
    for t in range(scheduler.step + 1, last + 1):
        x, y = part(t, rank, 0)
        dtype = next(engine.module.parameters()).dtype
        engine.backward(nn.functional.mse_loss(engine(x.to(dtype)).to(y.dtype), y))
        engine.step()


def result(engine, scheduler):
    model = engine.module
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        state = {key: value.clone() for key, value in model.state_dict().items() if "lora_" in key}
    return {
        "adapter": state,
        "ranks": scheduler.ranks,
        "history": [tuple(row) for row in scheduler.history.tolist()],
    }


def train_here(scenario, name, rank):
    engine, scheduler = begun(scenario, name)
    train(engine, scheduler, rank, STEPS)
    scheduler.detach()
    return result(engine, scheduler)


def train_in_two_parts(scenario, name, rank, folder):
    engine, scheduler = begun(scenario, name)
    train(engine, scheduler, rank, STOP)
    engine.save_checkpoint(folder)
    engine, scheduler = begun(scenario, name)
    engine.load_checkpoint(folder)
    train(engine, scheduler, rank, STEPS)
    scheduler.detach()
    return result(engine, scheduler)


def main():
    out = Path(sys.argv[1])
    with gloo() as rank:
        results = {}
        for name in sys.argv[2:] or ENGINES:
            results[name] = {scenario: train_here(scenario, name, rank) for scenario in ENGINES[name][1]}
            for scenario in ENGINES[name][1]:
                folder = out / f"{name} {scenario}".replace(" ", "_")
                results[name][scenario]["resumed"] = train_in_two_parts(scenario, name, rank, folder)
        keep(results, rank)
        dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
