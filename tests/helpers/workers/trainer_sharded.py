"""Run by torchrun: Trainer with a base that FSDP2 shards, or a model that FSDP1 does, beside
DistributedDataParallel.

Usage: trainer_sharded.py OUT WAY ..., where OUT/rank<N>.pt receives what each process got.
"""

import os
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from bert_trainer import WITHOUT_DROPOUT, arguments, classifier
from growing import growing
from increlora_rs import IncreLoraCallback
from launches import keep
from rows import Rows
from safetensors.torch import load_file
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor
from transformers import Trainer

STEPS, STOP = 12, 7
LAYERS = {"transformer_layer_cls_to_wrap": ["BertLayer"]}
WAYS = {
    "ddp": {},
    "fsdp": {"fsdp": True, "fsdp_config": LAYERS},
    "state in shards": {"fsdp": True, "fsdp_config": LAYERS | {"state_dict_type": "SHARDED_STATE_DICT"}},
    "fsdp1": {"fsdp": True, "fsdp_config": LAYERS | {"version": 1}},
}
# How each goes on from its checkpoint: with the adapter of it, or with a fresh one.
RESUMED = {
    "its adapter": ("fsdp", False),
    "a fresh adapter": ("fsdp", True),
    "a fresh adapter, state in shards": ("state in shards", True),
    "fsdp1, its adapter": ("fsdp1", False),
    "fsdp1, a fresh adapter": ("fsdp1", True),
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
            # It has a number in accelerate, and none in torch.
            self.device = torch.device("cpu")

    AcceleratorState.__init__ = made
    read = FullyShardedDataParallelPlugin.__post_init__

    def without_sync(self):
        # To send the first process's values it asks for an accelerator.
        self.sync_module_states = False if self.fsdp_version == 1 else None
        read(self)

    FullyShardedDataParallelPlugin.__post_init__ = without_sync
    for config in (fsdp.FullStateDictConfig, fsdp.FullOptimStateDictConfig):
        # torch takes what is on the CPU for a copy of its own, and frees it.
        config.offload_to_cpu = property(lambda _: False, lambda *_: None)


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


def is_sharded(parameter):
    return isinstance(parameter, DTensor) or getattr(parameter, "_fsdp_flattened", False)


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
    dist.barrier()
    saved = Path(out) / "saved" / "adapter_model.safetensors"
    return {
        "parameters": [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad],
        # With the state in shards nothing is written that PEFT can load.
        "saved": load_file(saved) if saved.is_file() else None,
        "history": callback.scheduler.history.tolist(),
        "ranks": callback.scheduler.ranks,
        "sharded": sum(map(is_sharded, trainer.model.parameters())),
    }


def main():
    torch.set_num_threads(1)
    allow_on_the_cpu()
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    # First, for what accelerate reads of the environment afterwards.
    ways = sys.argv[2:]
    results = {way: train(way, out / way) for way in ways}
    results["resumed"] = {
        name: train(way, out / way, resume=True, fresh=fresh)
        for name, (way, fresh) in RESUMED.items()
        if way in ways
    }
    keep(results, rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
