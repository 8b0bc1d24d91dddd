"""Run by torchrun: averages of an adapter of which each process has a piece, FSDP1's or FSDP2's; each process
saves what they came to, whole.

Usage: averaged_pieces.py OUT, where OUT/rank<N>.pt receives {(engine, scenario, holder): {name: average}}.
"""

import math

import capacity
import sharded_adapter
import torch
import torch.distributed as dist
from capacity import STEPS
from diffusers.training_utils import EMAModel
from increlora_rs import attach, keep_average
from increlora_rs.layers.found import all_adapted_layers
from launches import gloo, keep
from sharded import loss_of, trained
from torch.distributed.tensor import DTensor

SCENARIOS = ("growing", "moving", "paper")


def by_name(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ByName:
    """In a dictionary of tensors as the parameters are, replaced at each update."""

    def __init__(self, model):
        self.model = model
        self.tensors = {name: value.clone() for name, value in self.values().items()}

    def values(self):
        return by_name(self.model)

    def begin(self, scheduler):
        return keep_average(scheduler, lambda: self.tensors)

    def update(self):
        pairs = zip(self.tensors.values(), self.values().values(), strict=True)
        self.tensors = dict(zip(self.tensors, [0.8 * old + 0.2 * new for old, new in pairs], strict=True))


class Local(ByName):
    """Of this process's rows alone, in float64."""

    def values(self):
        return {name: local(value).double() for name, value in by_name(self.model).items()}


class InList(ByName):
    """As diffusers' EMAModel has it, with two that look after it."""

    def __init__(self, model):
        self.model, self.ema = model, EMAModel(trained(model), decay=0.8, min_decay=0.8)

    def begin(self, scheduler):
        keep_average(scheduler, self.ema)
        return keep_average(scheduler, self.ema.shadow_params, parameters=trained(self.model))

    def update(self):
        self.ema.step(trained(self.model))

    @property
    def tensors(self):
        return dict(zip(by_name(self.model), self.ema.shadow_params, strict=True))


HOLDERS = {"by name": ByName, "local": Local, "in a list": InList}
CASES = [
    (engine, scenario, holder)
    for engine, holders in {"FSDP1": ("by name", "in a list"), "FSDP2": tuple(HOLDERS)}.items()
    for scenario in SCENARIOS
    for holder in holders
]


def shapes(model):
    """Of the parameters when they are whole."""
    layers = all_adapted_layers(model)
    return [factor.room for layer in layers for factor in layer.held_factors("default")]


def plain(name):
    return name.replace("_fsdp_wrapped_module.", "")


def whole(average, model):
    """Pieces of all processes are rows, or numbers, that follow each other."""
    found = {}
    for (name, value), shape in zip(average.items(), shapes(model), strict=True):
        held = [None] * dist.get_world_size()
        dist.all_gather_object(held, local(value).reshape(-1))
        assert sum(piece.numel() for piece in held) == math.prod(shape)
        found[plain(name)] = torch.cat(held).view(shape)
    return found


def train_here(engine, scenario, holder, rank):
    if engine == "FSDP1":
        model, optimizer, scheduler = capacity.begun(scenario, engine)
    else:
        model, optimizer, scheduler = sharded_adapter.begun(scenario, "plain")
    average = HOLDERS[holder](model)
    average.begin(scheduler)
    for t in range(1, STEPS + 1):
        loss_of(model, t, rank, 0).backward()
        capacity.clip(model)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    scheduler.detach()
    return whole(average.tensors, model)


def train_alone(scenario, holder, processes):
    """One process that sees every process's batches."""
    model = capacity.model_for(scenario)
    optimizer = capacity.optimizer_of(model, scenario)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    average = HOLDERS[holder](model)
    average.begin(scheduler)
    for t in range(1, STEPS + 1):
        for rank in range(processes):
            (loss_of(model, t, rank, 0) / processes).backward()
        capacity.clip(model)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    scheduler.detach()
    assert scheduler.history.tolist()
    return average.tensors


def refusals():
    """What is said of averages that are parts of something else."""
    model, _, scheduler = sharded_adapter.begun("growing", "plain")
    told = {}
    for what, average in {
        "state dict": {key: value.clone() for key, value in model.state_dict().items() if "lora_" in key},
        "flat": {name: local(value).reshape(-1).clone() for name, value in by_name(model).items()},
    }.items():
        try:
            keep_average(scheduler, average)
        except NotImplementedError as error:
            told[what] = str(error)
    # Whole ones that all processes hold are followed as anywhere.
    ema = {name: value.full_tensor() for name, value in by_name(model).items()}
    keep_average(scheduler, ema)
    return told


def main():
    with gloo() as rank:
        results = {case: train_here(*case, rank) for case in CASES}
        keep(results | {"refusals": refusals()}, rank)


if __name__ == "__main__":
    main()
