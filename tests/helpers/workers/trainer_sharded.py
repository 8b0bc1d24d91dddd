"""Run by torchrun: Trainer with a base that FSDP2 shards, beside DistributedDataParallel.

Usage: trainer_sharded.py OUT, where OUT/rank<N>.pt receives what each process got.
"""

import os
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from bert_trainer import WITHOUT_DROPOUT, arguments, classifier
from growing import growing
from increlora_rs import IncreLoraCallback
from launches import keep
from rows import Rows
from torch.distributed.tensor import DTensor
from transformers import Trainer

STEPS, STOP = 12, 7
LAYERS = {"transformer_layer_cls_to_wrap": ["BertLayer"]}
WAYS = {
    "ddp": {},
    "fsdp": {"fsdp": True, "fsdp_config": LAYERS},
    "state in shards": {"fsdp": True, "fsdp_config": LAYERS | {"state_dict_type": "SHARDED_STATE_DICT"}},
}


def allow_on_the_cpu():
    """Has accelerate shard on the CPU, where it takes DistributedDataParallel instead, without a word."""
    make = AcceleratorState.__init__

    def made(self, *args, fsdp_plugin=None, **kwargs):
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        # Each further look at the shared state puts the CPU's back.
        if self._shared_state.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = made


def base():
    return classifier(**WITHOUT_DROPOUT)


def adapted():
    adapter = growing(
        task_type="SEQ_CLS",
        r=3,
        target_modules=["query", "value"],
        tinit=3,
        deltaT=2,
        top_h=3,
        growth_end=0.2,
    )
    return peft.get_peft_model(base(), adapter)


def train(way, out, resume=False, fresh=True):
    callback = IncreLoraCallback()
    checkpoint = Path(out) / f"checkpoint-{STOP}"
    trainer = Trainer(
        model=adapted() if fresh else peft.PeftModel.from_pretrained(base(), checkpoint, is_trainable=True),
        args=arguments(out, STEPS, STOP, gradient_accumulation_steps=2, max_grad_norm=0.5, **WAYS[way]),
        train_dataset=Rows(),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
    trainer.save_model(str(Path(out) / "saved"))
    sharded = [p for p in trainer.model.parameters() if isinstance(p, DTensor)]
    return {
        "parameters": [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad],
        "history": callback.scheduler.history.tolist(),
        "ranks": callback.scheduler.ranks,
        "sharded": len(sharded),
    }


def main():
    torch.set_num_threads(1)
    allow_on_the_cpu()
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    # First, for what accelerate reads of the environment afterwards.
    results = {way: train(way, out / way) for way in WAYS}
    results["resumed"] = {
        "its adapter": train("fsdp", out / "fsdp", resume=True, fresh=False),
        "a fresh adapter": train("fsdp", out / "fsdp", resume=True),
        "a fresh adapter, state in shards": train("state in shards", out / "state in shards", resume=True),
    }
    keep(results, rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
