"""Run by torchrun: a model that is split over two processes in other ways than by its data; each process
saves what the way came to: the text of the exception, or whether the processes ended alike.

Usage: parallel.py OUT, where OUT/rank<N>.pt receives {way: result}.
"""

import peft
import torch
import torch.distributed as dist
from increlora_rs import attach
from launches import gloo, keep
from sharded import Net, config_for, loss_of, shard, trained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

STEPS = 12


def split(net, mesh, *, layer=""):
    """Tensor parallelism over the second block."""
    parallelize_module(
        net.blocks[1], mesh, {f"up{layer}": ColwiseParallel(), f"down{layer}": RowwiseParallel()}
    )


def tensor_before(rank):
    torch.manual_seed(3)
    net = Net()
    split(net, init_device_mesh("cpu", (2,)))
    return peft.get_peft_model(net, config_for("plain"))


def tensor_after(rank):
    torch.manual_seed(3)
    model = peft.get_peft_model(Net(), config_for("plain"))
    split(model.base_model.model, init_device_mesh("cpu", (2,)), layer=".base_layer")
    return model


def tensor_beside(rank):
    """What is split is not adapted: processes see the same data."""
    torch.manual_seed(3)
    net = Net()
    split(net, init_device_mesh("cpu", (2,)))
    config = config_for("plain")
    config.target_modules = ["blocks.0.up", "blocks.0.down", "first"]
    return peft.get_peft_model(net, config)


def pipeline(rank):
    """The first process has the first half, the second one the other."""
    torch.manual_seed(3)
    net = Net()
    del net.blocks[1 - rank]
    config = config_for("plain")
    if rank:
        net.first = torch.nn.Identity()
        config.target_modules = ["up", "down"]
    return peft.get_peft_model(net, config)


def fewer_of_the_data(rank):
    """FSDP over a mesh that is not all of the processes."""
    torch.manual_seed(3)
    model = peft.get_peft_model(Net(), config_for("plain"))
    shard(model, "plain", init_device_mesh("cpu", (2, 1), mesh_dim_names=("other", "data"))["data"])
    return model


WAYS = {
    "tensor, adapted after": tensor_before,
    "tensor, adapted before": tensor_after,
    "tensor, beside the adapter": tensor_beside,
    "pipeline": pipeline,
    "sharded over some": fewer_of_the_data,
}


def outcome(way, rank):
    try:
        model = WAYS[way](rank)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        scheduler = attach(model, optimizer, total_steps=STEPS)
        for t in range(1, STEPS + 1):
            loss_of(model, t, 0, 0).backward()
            optimizer.step()
            optimizer.zero_grad()
    except ValueError as error:
        return str(error)
    return {"ranks": scheduler.ranks, "parameters": [p.detach().clone() for p in trained(model)]}


def main():
    with gloo() as rank:
        results = {}
        for way in WAYS:
            results[way] = outcome(way, rank)
            dist.barrier()
        keep(results, rank)


if __name__ == "__main__":
    main()
