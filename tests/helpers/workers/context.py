"""Run by torchrun: context parallelism, a part of each sequence in every process; each saves what it got.

Usage: context.py OUT, where OUT/rank<N>.pt receives {way: result}.
"""

import peft
import torch
import torch.distributed as dist
from increlora_rs import IncreLoraConfig, adapter_parameters, attach
from launches import gloo, keep
from sharded import STEPS, result, trained
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import _cp_options
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

WAYS = {
    "DDP, moving": {},
    "DDP, growing": {"importance": "gradient", "growth_end": 0.5, "top_h": 2},
    "FSDP2, moving": {},
}


class Attending(nn.Module):
    """Attention of two heads to the whole sequence; x (batch, sequence, 9) to (batch, sequence, 6)."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(9, 12), nn.Linear(12, 6)
        self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        heads = (part(x).unflatten(-1, (2, 6)).transpose(1, 2) for part in (self.query, self.key, self.value))
        # By its full name, under which torch puts the one that is split.
        found = nn.functional.scaled_dot_product_attention(*heads)
        return self.head(x + found.transpose(1, 2).flatten(2))


def adapted(way):
    torch.manual_seed(3)
    targets = ["first", "query", "key", "value"]
    config = IncreLoraConfig(r=2, lora_alpha=4, target_modules=targets, tinit=3, deltaT=3, **WAYS[way])
    return peft.get_peft_model(Attending(), config)


def wrapped(model, way):
    if way.startswith("DDP"):
        return DistributedDataParallel(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=adapter_parameters(model))
    return model


def batch(t):
    x = torch.randn(4, 8, 9, generator=torch.Generator().manual_seed(t))
    return x, torch.sin(2 * x[..., :6] + x[..., :6].mean(1, keepdim=True))


def train(model, backward):
    """``backward(x, y)`` of each step's whole sequences."""
    optimizer = torch.optim.AdamW(trained(model), lr=5e-2)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    for t in range(1, STEPS + 1):
        backward(*batch(t))
        optimizer.step()
        optimizer.zero_grad()
    scheduler.detach()
    return result(model, scheduler)


def train_here(way):
    model, mesh = wrapped(adapted(way), way), init_device_mesh("cpu", (2,))

    def backward(x, y):
        # Of torch's kinds of attention the one that can be split on the CPU.
        with context_parallel(mesh, buffers=[x, y], buffer_seq_dims=[1, 1]), sdpa_kernel(SDPBackend.MATH):
            assert x.shape[1] == 4
            mse_loss(model(x), y).backward()

    return train(model, backward)


def train_alone(way):
    """One process that sees the sequences whole."""
    model = adapted(way)
    return train(model, lambda x, y: mse_loss(model(x), y).backward())


def main():
    # That is for causal attention.
    _cp_options.enable_load_balance = False
    with gloo() as rank:
        results = {}
        for way in WAYS:
            results[way] = train_here(way)
            dist.barrier()
        keep(results, rank)


if __name__ == "__main__":
    main()
