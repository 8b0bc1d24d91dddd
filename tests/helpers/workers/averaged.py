"""Run by torchrun: who averages the gradients of an adapter that is whole in two processes? Nobody, the
user's script, or DistributedDataParallel in one of its forms; each process saves what came of it.

Usage: averaged.py OUT, where OUT/rank<N>.pt receives {script: result, or the text of the exception}.
"""

import sys

import ddp as whole
import torch
import torch.distributed as dist
from increlora_rs import attach
from launches import gloo, keep
from torch.distributed._composable.replicate import replicate
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

STEPS = whole.STEPS
# The names of the scripts that average, and of those that do not.
RIGHT = [
    "hooks on the gradients",
    "a sum in hooks",
    "a mean before the step",
    "a gathered mean",
    "a wrapper around a part",
    "replicate",
    "ZeRO-1 in a wrapper",
    "the same data",
]
WRONG = [
    "no wrapper",
    "ZeRO-1",
    "a wrapper around some modules",
    "the model inside the wrapper",
    "never in step",
    "other values",
    "averaged in the first step alone",
]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def mean_(gradient):
    dist.all_reduce(gradient)
    gradient /= dist.get_world_size()


def gathered_mean_(gradient):
    parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, gradient)
    # The own one first: each process rounds in another order.
    rank = dist.get_rank()
    gradient.copy_(sum(parts[rank:] + parts[:rank]) / len(parts))


def wrapped(model, script):
    """What is called for the loss."""
    inner = model.base_model.model
    if script == "a wrapper around a part":
        return DistributedDataParallel(torch.nn.Sequential(*inner))
    if script == "a wrapper around some modules":
        inner[2] = DistributedDataParallel(inner[2])
    if script == "replicate":
        return replicate(model)
    if script in ("ZeRO-1 in a wrapper", "the model inside the wrapper", "never in step"):
        return DistributedDataParallel(model)
    return model


def backward(net, script, t, rank):
    if script == "the model inside the wrapper":
        whole.loss_of(net.module, t, rank).backward()
    elif script == "never in step":
        with net.no_sync():
            whole.loss_of(net, t, rank).backward()
    else:
        divisor = dist.get_world_size() if script == "a sum in hooks" else 1
        (whole.loss_of(net, t, rank) / divisor).backward()


def before_step(model, script, t):
    if script == "a mean before the step" or (t == 1 and script == "averaged in the first step alone"):
        for p in trained(model):
            mean_(p.grad)
    elif script == "a gathered mean":
        for p in trained(model):
            gathered_mean_(p.grad)


def train(script, rank):
    """As ddp.py's; or the error, and the steps until it."""
    model = whole.model_for("plain")
    torch.manual_seed(100 + rank)
    if script == "other values" and rank:
        with torch.no_grad():
            trained(model)[0].normal_()
    net = wrapped(model, script)
    if script.startswith("ZeRO-1"):
        optimizer = ZeroRedundancyOptimizer(trained(model), torch.optim.AdamW, lr=1e-2)
    else:
        optimizer = whole.optimizer_of(model)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    if script in ("hooks on the gradients", "a sum in hooks"):
        take = mean_ if script == "hooks on the gradients" else dist.all_reduce
        for p in trained(model):
            p.register_post_accumulate_grad_hook(lambda p: take(p.grad))
    for t in range(1, STEPS + 1):
        backward(net, script, t, 0 if script == "the same data" else rank)
        before_step(model, script, t)
        try:
            optimizer.step()
        except ValueError as error:
            return {"error": str(error), "step": scheduler.step}
        optimizer.zero_grad()
    return whole.result(model, scheduler)


def main():
    with gloo() as rank:
        keep({script: train(script, rank) for script in sys.argv[2:] or (*RIGHT, *WRONG)}, rank)


if __name__ == "__main__":
    main()
