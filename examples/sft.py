"""TRL's SFTTrainer with growing ranks: TRL makes the adapter, the callback makes it grow.

python examples/sft.py --out adapter
"""

import argparse
from pathlib import Path

import increlora_rs
import tiny
from datasets import Dataset
from peft import TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="directory of a decoder; default: a small random one")
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--rank", type=int, default=3, help="average rank at the end")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    set_seed(0)
    if options.model is None:
        model, tokenizer = tiny.llama(), tiny.tokenizer()
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    growth = increlora_rs.IncreLoraCallback()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(options.out / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            max_length=32,
            save_strategy="no",
            report_to="none",
            logging_steps=20,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"text": tiny.sentences()}),
        processing_class=tokenizer,
        # In place of LoraConfig.
        peft_config=increlora_rs.IncreLoraConfig(
            task_type=TaskType.CAUSAL_LM, r=options.rank, lora_alpha=16, target_modules=["q_proj", "v_proj"]
        ),
        callbacks=[growth],
    )
    trainer.train()
    trainer.model.save_pretrained(options.out)
    print(f"parameters {growth.scheduler.spent} of {growth.scheduler.budget}")


if __name__ == "__main__":
    main()
