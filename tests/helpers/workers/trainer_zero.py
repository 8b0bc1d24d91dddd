"""Run by torchrun: Trainer with `deepspeed`, on the CPU.

Usage: trainer_zero.py OUT STAGE ..., where OUT/rank<N>.pt receives what each process got.
"""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from bert_trainer import arguments
from increlora_rs import IncreLoraCallback
from launches import keep
from rows import Rows
from safetensors.torch import load_file
from trainer_sharded import STEPS, STOP, adapted
from transformers import Trainer
from zero_stages import SMALL

# As in zero.py.
deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)


def config(stage):
    zero = {"stage": stage} | SMALL
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
    }


def train(stage, out, resume=False):
    callback = IncreLoraCallback()
    given = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "deepspeed": config(stage)}
    trainer = Trainer(
        args=arguments(out, STEPS, STOP, use_cpu=False, **given),
        model=adapted(),
        train_dataset=Rows(),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{STOP}") if resume else None)
    trainer.save_model(str(out / "saved"))
    dist.barrier()
    return {
        "saved": load_file(out / "saved" / "adapter_model.safetensors"),
        "history": callback.scheduler.history.tolist(),
        "ranks": callback.scheduler.ranks,
        "engine": type(trainer.model_wrapped).__name__,
    }


def allow_on_the_cpu():
    """Has accelerate use DeepSpeed in several processes without an accelerator, where it takes one."""
    make = PartialState.__init__

    def made(self, *args, **kwargs):
        make(self, cpu=True, backend="gloo")
        self.distributed_type = DistributedType.DEEPSPEED
        self.device, self._cpu = torch.device("cpu"), False

    PartialState.__init__ = made


def main():
    torch.set_num_threads(1)
    allow_on_the_cpu()
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    results = {}
    for stage in map(int, sys.argv[2:]):
        results[stage] = train(stage, out / f"stage{stage}")
        results[stage]["resumed"] = train(stage, out / f"stage{stage}", resume=True)
    keep(results, rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
