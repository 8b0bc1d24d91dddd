"""Run by torchrun: trainings whose every call of a collective by increlora_rs is counted.

Usage: given.py OUT, where OUT/rank<N>.pt receives {(engine, scenario): {"attach": bytes, "steps": [a record a
step]}}.
"""

import math
import sys
from collections import defaultdict
from contextlib import contextmanager

import capacity
import sharded
import sharded_adapter
import torch
import torch.distributed as dist
from increlora_rs import attach, keep_average
from launches import gloo, keep
from torch.nn.parallel import DistributedDataParallel

CASES = [
    *(("DDP", scenario) for scenario in ("moving", "growing", "sensitivity")),
    *(("FSDP2", scenario) for scenario in ("moving", "growing")),
    *(("FSDP1", scenario) for scenario in ("moving", "growing", "paper")),
    *(("FSDP2, adapter sharded", scenario) for scenario in ("moving", "growing")),
]
# Of capacity.STEPS: the last growth is at step 12.
STEPS = 13


@contextmanager
def counted():
    """Bytes by name of the collective, of calls from the library; an object counts as 0."""
    found, names = defaultdict(int), ("all_reduce", "broadcast", "all_gather_object", "broadcast_object_list")
    before = {name: getattr(dist, name) for name in names}

    def counting(name):
        def call(*arguments, **options):
            if sys._getframe(1).f_globals["__name__"].startswith("increlora_rs."):
                tensor = arguments[0]
                found[name] += tensor.nbytes if isinstance(tensor, torch.Tensor) else 0
            return before[name](*arguments, **options)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name, collective in before.items():
            setattr(dist, name, collective)


def begun(engine, scenario):
    if engine == "FSDP1":
        model = capacity.wrapped(capacity.model_for(scenario), engine)
    elif engine == "FSDP2, adapter sharded":
        model = sharded_adapter.sharded(capacity.model_for(scenario), "plain")
    else:
        model = capacity.model_for(scenario, "resize")
        if engine == "FSDP2":
            sharded.shard(model, "plain")
        else:
            model = DistributedDataParallel(model)
    return model, capacity.optimizer_of(model, scenario)


def record(engine, scenario, rank):
    model, optimizer = begun(engine, scenario)
    with counted() as at_attach:
        scheduler = attach(model, optimizer, total_steps=capacity.STEPS)
    averaged = engine == "FSDP2, adapter sharded"
    with counted() as at_average:
        if averaged:
            keep_average(scheduler, [p.detach().clone() for p in sharded.trained(model)])
    policy, modules, steps, told = scheduler.policy, scheduler.session.modules, [], []
    factors = [factor for module in modules for factor in module.layer.held_factors(module.adapter)]
    sizes = {id(factor.weight): math.prod(factor.room or ()) for factor in factors}
    scheduler.on_growth(lambda event: told.extend(event.resizes))
    for number in range(1, STEPS + 1):
        before = [module.rank for module in modules]
        facts = {
            "rows": [module.rows for module in modules],
            "armed": policy.wants(number),
            "decides": policy.decides(number),
        }
        told.clear()
        with counted() as given:
            sharded.loss_of(model, number, rank, 0).backward()
            optimizer.step()
        optimizer.zero_grad()
        facts["grown"] = [k for k, module in enumerate(modules) if module.rank > before[k]]
        # Of parameters of which rows went, the numbers that they have room for.
        facts["shrunk"] = [sizes[id(resize.parameter)] for resize in told if resize.removed]
        facts["averaged"] = averaged and bool(told)
        steps.append(facts | {"given": dict(given)})
    return {
        "attach": dict(at_attach),
        "average": dict(at_average),
        "steps": steps,
        "sizes": [(module.layer.out_features, module.layer.in_features) for module in modules],
        "room": [rooms(module)[-1] for module in modules],
    }


def rooms(module):
    """Rows that each of its parameters has room for; 0 where they change their size."""
    factors = module.layer.held_factors(module.adapter)
    return [0 if factor.room is None else factor.room[factor.dim] for factor in factors]


def main():
    with gloo() as rank:
        keep({case: record(*case, rank) for case in CASES}, rank)


if __name__ == "__main__":
    main()
