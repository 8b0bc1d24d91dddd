"""PyTorch Lightning with growing ranks: attach where the optimizer is made.

python examples/lightning_loop.py --out adapter
"""

import argparse
from pathlib import Path

import increlora_rs
import pytorch_lightning as lightning
import tiny
import torch
from peft import TaskType, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Classifier(lightning.LightningModule):
    """A classifier with an adapter."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """The loss of one batch."""
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer, with the scheduler of the ranks attached to it."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=5e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        self.growth = increlora_rs.attach(self.model, optimizer, total_steps=steps)
        return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="directory of a classifier; default: a small random one")
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--rank", type=int, default=3, help="average rank at the end")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
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
    classifier = Classifier(get_peft_model(model, config))

    rows = [(sentence, tiny.ANIMALS.index(sentence.split()[-2])) for sentence in tiny.sentences()]

    def collate(batch: list[tuple[str, int]]) -> dict[str, Tensor]:
        texts, answers = zip(*batch, strict=True)
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        return {**inputs, "labels": torch.tensor(answers)}

    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate))
    classifier.model.save_pretrained(options.out)
    print(f"parameters {classifier.growth.spent} of {classifier.growth.budget}")


if __name__ == "__main__":
    main()
