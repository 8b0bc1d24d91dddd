"""Run by torchrun: an adapter whose modules share their parameters under DistributedDataParallel, with
and without checkpointing.

Usage: shared_parameters.py OUT, where OUT/rank<N>.pt receives {scenario: the gradients of each step, and the
parameters at the end}.
"""

import os
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from increlora_rs import LortaConfig, attach
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification

QKVO = ["query", "key", "value", "attention.output.dense"]
# Checkpointing (None: none), and what is given to DDP.
SCENARIOS = {
    "plain": (None, {}),
    "checkpointing": (False, {}),
    "static graph": (None, {"static_graph": True}),
    "bucket view": (None, {"gradient_as_bucket_view": True}),
    "reentrant checkpointing, static graph": (True, {"static_graph": True}),
    "reentrant checkpointing": (True, {}),
    "reentrant checkpointing, accumulation": (True, {}),
}
STEPS = 3


def model_of(reentrant):
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=20,
        max_position_embeddings=16,
        num_labels=3,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    adapter = LortaConfig(r=2, target_modules=QKVO, init_lora_weights=False)
    model = peft.get_peft_model(BertForSequenceClassification(config).double(), adapter).double().train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def batch(step, rank):
    ids = torch.randint(5, 50, (4, 7), generator=torch.Generator().manual_seed(10 * step + rank))
    return {"input_ids": ids, "labels": ids[:, 0] % 3}


def train(model, passes):
    """The gradients of each step, which is a list of backward passes, and what is trained."""
    inside = model.module if isinstance(model, DistributedDataParallel) else model
    parameters = {name: p for name, p in inside.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    attach(model, optimizer, total_steps=STEPS)
    gradients = []
    for step in range(STEPS):
        for one in passes(step):
            one()
        gradients.append({name: p.grad.clone() for name, p in parameters.items()})
        optimizer.step()
        optimizer.zero_grad()
    return {"gradients": gradients, "parameters": {name: p.detach() for name, p in parameters.items()}}


def together(scenario, rank):
    reentrant, options = SCENARIOS[scenario]
    model = DistributedDataParallel(model_of(reentrant), **options)

    def loss(step, rows=slice(None)):
        return model(**{key: value[rows] for key, value in batch(step, rank).items()}).loss

    if not scenario.endswith("accumulation"):
        return train(model, lambda step: [lambda: loss(step).backward()])

    def first(step):
        with model.no_sync():
            (loss(step, slice(0, 2)) / 2).backward()

    return train(model, lambda step: [lambda: first(step), lambda: (loss(step, slice(2, 4)) / 2).backward()])


def alone(processes):
    """One process that sees the rows of all, as micro-batches of the averaged loss."""
    model = model_of(None)

    def passes(step):
        parts = [batch(step, rank) for rank in range(processes)]
        return [lambda part=part: (model(**part).loss / processes).backward() for part in parts]

    return train(model, passes)


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    torch.save({name: together(name, rank) for name in SCENARIOS}, Path(sys.argv[1]) / f"rank{rank}.pt")
    dist.barrier()
    # The end of a DDP may wait for ever for gloo's thread, which wants the GIL (torch 2.13).
    os._exit(0)


if __name__ == "__main__":
    main()
