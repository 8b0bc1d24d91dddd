"""A loop of one's own under accelerate, with growing ranks, in one process or several.

accelerate launch --num_processes 2 --cpu examples/accelerate_loop.py --out adapter
"""

import argparse
from pathlib import Path

import increlora_rs
import tiny
import torch
from accelerate import Accelerator
from peft import TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_scheduler, set_seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="directory of a classifier; default: a small random one")
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--rank", type=int, default=3, help="average rank at the end")
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator()
    if options.model is None:
        model, tokenizer = tiny.bert_classifier(len(tiny.ANIMALS)), tiny.tokenizer()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            options.model, num_labels=len(tiny.ANIMALS)
        )
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = increlora_rs.IncreLoraConfig(
        task_type=TaskType.SEQ_CLS, r=options.rank, lora_alpha=16, target_modules=["query", "value"]
    )
    model = get_peft_model(model, config)

    # Which animal waits?
    labels = [tiny.ANIMALS.index(sentence.split()[-2]) for sentence in tiny.sentences()]
    rows = list(zip(tiny.sentences(), labels, strict=True))

    def collate(batch: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts, answers = zip(*batch, strict=True)
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        return {**inputs, "labels": torch.tensor(answers)}

    loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = options.epochs * len(loader)
    warmup = steps // 10
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    # The one line that plain LoRA does not need.
    growth = increlora_rs.attach(model, optimizer, total_steps=steps, lr_warmup_steps=warmup)
    for _ in range(options.epochs):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(options.out, is_main_process=accelerator.is_main_process)
    accelerator.print(f"loss {loss.item():.3f}; parameters {growth.spent} of {growth.budget}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
