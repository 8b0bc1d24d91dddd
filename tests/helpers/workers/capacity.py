"""Run by torchrun: an adapter in the capacity form under engines that lay parameters out once and for all;
each process saves what it got.

Usage: capacity.py OUT [ENGINE ...], where OUT/rank<N>.pt receives {engine: {scenario: result}}.
"""

import copy
import sys
import warnings

import peft
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, attach, keep_average
from launches import gloo, keep
from sharded import STEPS, STOP, Block, Net, loss_of, optimizer_of, trained
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# What each asks of the process group, and how FSDP1 shards.
ENGINES = {
    "DDP": None,
    "FSDP1": ShardingStrategy.FULL_SHARD,
    "FSDP1, gradients alone": ShardingStrategy.SHARD_GRAD_OP,
    "FSDP1, nothing": ShardingStrategy.NO_SHARD,
}
RESUMED = ("FSDP1",)
SCENARIOS = {
    "growing": {},
    "moving": {},
    "paper": {},
    "from nothing": {"init_r": 0, "importance_window": 2},
    "sensitivity": {"importance": "sensitivity"},
    "in parameters": {"budget_unit": "parameters", "max_r": 4},
}


def config_for(scenario, growth="capacity"):
    shared = {"r": 2, "lora_alpha": 4, "target_modules": ["up", "down", "first"], "growth": growth}
    if scenario == "moving":
        return IncreLoraConfig(tinit=3, deltaT=3, **shared)
    make = IncreLoraConfig.paper if scenario == "paper" else growing
    return make(top_h=2, tinit=3, deltaT=3, **shared | SCENARIOS[scenario])


def model_for(scenario, growth="capacity"):
    return model_of(config_for(scenario, growth))


def model_of(config):
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="growth='capacity'")
        return peft.get_peft_model(Net(), config)


def wrapped(model, engine):
    strategy = ENGINES[engine]
    if strategy is None:
        return DistributedDataParallel(model)
    return FSDP(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        sharding_strategy=strategy,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def clip(model):
    model.clip_grad_norm_(0.2) if isinstance(model, FSDP) else clip_grad_norm_(trained(model), 0.2)


def begun(scenario, engine):
    model = wrapped(model_for(scenario), engine)
    optimizer = optimizer_of(model, scenario)
    return model, optimizer, attach(model, optimizer, total_steps=STEPS)


class Average:
    """One that follows ``model``, updated after each step."""

    def __init__(self, scheduler, model):
        self.of, self.model = model, AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        keep_average(scheduler, self.model)

    def update(self):
        self.model.update_parameters(self.of)

    def adapter(self):
        state = self.model.module.state_dict()
        return {key.removeprefix("module."): value for key, value in state.items() if "lora_" in key}


def train(model, optimizer, scheduler, rank, last, average=None):
    for t in range(scheduler.step + 1, last + 1):
        loss_of(model, t, rank, 0).backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update()


def whole(model):
    """The state dicts of the wrapped model and of its optimizer, the same in all processes."""
    # With offload_to_cpu, the default, torch 2.13 gives all keys of a state on the CPU the last one's values.
    of_optimizer = FullOptimStateDictConfig(offload_to_cpu=False)
    return FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(), of_optimizer)


def result(model, scheduler, average=None):
    if isinstance(model, FSDP):
        with whole(model):
            state = model.state_dict()
    else:
        state = (
            model.module.state_dict() if isinstance(model, DistributedDataParallel) else model.state_dict()
        )
    return {
        "adapter": {key: value.clone() for key, value in state.items() if "lora_" in key},
        "ranks": scheduler.ranks,
        "history": [tuple(row) for row in scheduler.history.tolist()],
    } | ({} if average is None else {"average": average.adapter()})


def train_here(scenario, engine, rank):
    model, optimizer, scheduler = begun(scenario, engine)
    average = Average(scheduler, model) if engine == "DDP" else None
    train(model, optimizer, scheduler, rank, STEPS, average)
    scheduler.detach()
    return result(model, scheduler, average)


def train_in_two_parts(scenario, engine, rank):
    model, optimizer, scheduler = begun(scenario, engine)
    train(model, optimizer, scheduler, rank, STOP)
    with whole(model):
        saved = copy.deepcopy((model.state_dict(), FSDP.optim_state_dict(model, optimizer)))
    model, optimizer, scheduler = begun(scenario, engine)
    with whole(model):
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(FSDP.optim_state_dict_to_load(model, optimizer, saved[1]))
    train(model, optimizer, scheduler, rank, STEPS)
    scheduler.detach()
    return result(model, scheduler)


def train_alone(scenario, processes, growth="resize"):
    """One process that sees every process's batches, in the form ``growth``."""
    model = model_for(scenario, growth)
    optimizer = optimizer_of(model, scenario)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    average = Average(scheduler, model)
    for t in range(1, STEPS + 1):
        for rank in range(processes):
            (loss_of(model, t, rank, 0) / processes).backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    scheduler.detach()
    return result(model, scheduler, average)


def main():
    with gloo() as rank:
        results = {}
        for engine in sys.argv[2:] or ENGINES:
            results[engine] = {scenario: train_here(scenario, engine, rank) for scenario in SCENARIOS}
            if engine in RESUMED:
                for scenario in SCENARIOS:
                    results[engine][scenario]["resumed"] = train_in_two_parts(scenario, engine, rank)
        keep(results, rank)


if __name__ == "__main__":
    main()
