"""Run by torchrun: Trainer in several processes, whole and resumed; and an FSDP2 model, refused.

Usage: trainer.py OUT, where OUT/rank<N>.pt receives what each process got.
"""

import os
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from bert_trainer import arguments, classifier
from growing import growing
from increlora_rs import IncreLoraCallback, IncreLoraConfig, attach
from launches import keep
from rows import Rows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer

STEPS = 20
STOP = 9


def adapted(make):
    adapter = make(
        task_type="SEQ_CLS",
        r=3,
        lora_dropout=0.1,
        target_modules=["query", "value"],
        tinit=3,
        deltaT=4,
        top_h=3,
    )
    return peft.get_peft_model(classifier(), adapter)


def train(make, out, resume):
    callback = IncreLoraCallback()
    trainer = Trainer(
        model=adapted(make),
        args=arguments(out, STEPS, STOP, warmup_steps=2),
        train_dataset=Rows(),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=str(Path(out) / f"checkpoint-{STOP}") if resume else None)
    return {
        "parameters": {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad},
        "history": callback.scheduler.history.tolist(),
        "total_rank": callback.scheduler.total_rank,
    }


def sharded():
    model = adapted(growing)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    try:
        attach(model, optimizer, total_steps=20)
    except ValueError as error:
        return str(error)
    return "attached"


def main():
    torch.set_num_threads(1)
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    results = {}
    for name, make in (("growing", growing), ("paper", IncreLoraConfig.paper)):
        results[name, "whole"] = train(make, out / name, resume=False)
        results[name, "resumed"] = train(make, out / name, resume=True)
    results["sharded"] = sharded()
    keep(results, rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
