"""TRL's DPOTrainer with growing ranks; the reference is the base model, the adapter switched off.

python examples/dpo.py --out adapter
"""

import argparse
from pathlib import Path

import increlora_rs
import tiny
from datasets import Dataset
from peft import TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer


def preferences() -> Dataset:
    """Whoever sings is preferred to whoever sleeps."""
    pairs = [(animal, doing) for animal in tiny.ANIMALS for doing in tiny.DOINGS if doing != "sings"]
    return Dataset.from_dict(
        {
            "prompt": [f"the {animal}" for animal, _ in pairs],
            "chosen": [" sings and waits" for _ in pairs],
            "rejected": [f" {doing} and waits" for _, doing in pairs],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="directory of a decoder; default: a small random one")
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--rank", type=int, default=3, help="average rank at the end")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    set_seed(0)
    if options.model is None:
        model, tokenizer = tiny.llama(), tiny.tokenizer()
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    growth = increlora_rs.IncreLoraCallback()
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(options.out / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            max_length=32,
            save_strategy="no",
            report_to="none",
            logging_steps=10,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=preferences(),
        processing_class=tokenizer,
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
