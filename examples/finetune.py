"""Fine-tune your own classifier with growing ranks: a local model directory and a file of examples.

    python examples/finetune.py --model MODEL_DIR --data reviews.csv --out my-adapter

The file is TSV, CSV or JSONL with a column ``text`` and a column ``label`` (or name them). A tenth of
it is held out. What differs from a script with plain LoRA is marked (1) and (2).
"""

import argparse
import csv
import json
import random
from pathlib import Path

import increlora_rs
import numpy as np
from peft import TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a TSV, CSV or JSONL file."""
    with open(path, encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file if line.strip()]
        if path.suffix in (".tsv", ".csv"):
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    raise SystemExit(f"--data {path}: the name must end in .tsv, .csv or .jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a classifier with growing ranks.")
    parser.add_argument("--model", type=Path, required=True, help="directory of a Transformers model")
    parser.add_argument("--data", type=Path, required=True, help="TSV, CSV or JSONL file")
    parser.add_argument("--out", type=Path, default=Path("finetuned"))
    parser.add_argument("--text", default="text", help="name of the text's column")
    parser.add_argument("--label", default="label", help="name of the label's column")
    parser.add_argument("--rank", type=int, default=8, help="average rank at the end")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rows = read_rows(options.data)
    for column in (options.text, options.label):
        if not rows or column not in rows[0]:
            found = list(rows[0]) if rows else "no rows"
            raise SystemExit(f"{options.data} has no column {column!r}; it has {found}")
    random.Random(options.seed).shuffle(rows)
    labels = sorted({str(row[options.label]) for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    examples = [
        tokenizer(row[options.text], truncation=True, max_length=options.max_length)
        | {"labels": labels.index(str(row[options.label]))}
        for row in rows
    ]
    held_out = max(1, len(examples) // 10)

    set_seed(options.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    # (1) IncreLoraConfig in place of LoraConfig.
    config = increlora_rs.IncreLoraConfig(
        task_type=TaskType.SEQ_CLS, r=options.rank, lora_alpha=16, target_modules="all-linear"
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.out / "trainer"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch,
            learning_rate=options.lr,
            warmup_steps=0.1,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=examples[held_out:],
        eval_dataset=examples[:held_out],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(1) == p.label_ids))},
        callbacks=[increlora_rs.IncreLoraCallback()],  # (2)
    )
    trainer.train()

    model.save_pretrained(options.out / "adapter")
    increlora_rs.export_lora(model, options.out / "lora")
    print(increlora_rs.rank_table(model))
    print(f"adapter: {options.out / 'adapter'}, the same as a plain LoRA: {options.out / 'lora'}")


if __name__ == "__main__":
    main()
