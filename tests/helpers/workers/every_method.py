"""Run by torchrun: trains methods under DistributedDataParallel and in Trainer, each whole and resumed.

Usage: every_method.py OUT METHOD ..., where OUT/rank<N>.pt receives {method: {(way, part): result}}.
"""

import os
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from bert_trainer import WITHOUT_DROPOUT, arguments, classifier
from increlora_rs import IncreLoraCallback, attach
from increlora_rs.methods import METHODS
from launches import keep
from method_cases import batch, optimizer_of, ranks_of, ready, trainable
from rows import Rows
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

STOP, STEPS = 5, 12


def base():
    # In float64, so that only the method, not rounding, can make two processes differ from one.
    return classifier(max_position_embeddings=32, **WITHOUT_DROPOUT).double()


def result(method, model):
    return {"parameters": trainable(model), "ranks": ranks_of(method, model)}


def part_of(step, rank):
    return {key: value.chunk(2)[rank] for key, value in batch(step).items()}


def loop(model, rank, steps, state=None):
    """The steps of these numbers; the optimizer."""
    # Seeds that differ must not make the processes draw different numbers.
    torch.manual_seed(100 + rank)
    optimizer = optimizer_of(model)
    if state is not None:
        optimizer.load_state_dict(state)
    ddp = DistributedDataParallel(model)
    attach(ddp, optimizer, total_steps=STEPS)
    for step in steps:
        ddp(**part_of(step, rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def in_a_loop(method, out, rank):
    whole, stopped = (ready(method, base()).double() for _ in range(2))
    loop(whole, rank, range(STEPS))
    optimizer = loop(stopped, rank, range(STOP))
    if rank == 0:
        stopped.save_pretrained(out)
    dist.barrier()
    resumed = peft.PeftModel.from_pretrained(base(), out, is_trainable=True, autocast_adapter_dtype=False)
    loop(resumed.train(), rank, range(STOP, STEPS), optimizer.state_dict())
    return {("loop", "whole"): result(method, whole), ("loop", "resumed"): result(method, resumed)}


def in_trainer(method, out, resume):
    trainer = Trainer(
        model=ready(method, base().float(), task_type="SEQ_CLS", lora_dropout=0.1),
        args=arguments(out, STEPS, STOP, warmup_steps=2),
        train_dataset=Rows(64),
        callbacks=[IncreLoraCallback()],
    )
    trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{STOP}") if resume else None)
    return result(method, trainer.model)


def train_alone(method):
    """One process that sees both processes' rows, as micro-batches of the averaged loss."""
    model = ready(method, base()).double()
    torch.manual_seed(100)
    optimizer = optimizer_of(model)
    attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        for rank in range(2):
            (model(**part_of(step, rank)).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(method, model)


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    results = {}
    for method in METHODS:
        if method.name in sys.argv[2:]:
            results[method.name] = in_a_loop(method, out / method.name / "loop", rank)
            for part in ("whole", "resumed"):
                trained = in_trainer(method, out / method.name / "trainer", resume=part == "resumed")
                results[method.name]["trainer", part] = trained
    keep(results, rank)
    dist.barrier()
    # The end of a DDP may wait for ever for gloo's thread, which wants the GIL (torch 2.13).
    os._exit(0)


if __name__ == "__main__":
    main()
