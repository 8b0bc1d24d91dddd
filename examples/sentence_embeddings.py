"""The trainer of sentence-transformers with growing ranks.

python examples/sentence_embeddings.py --out adapter
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import increlora_rs
import tiny
from datasets import Dataset
from peft import TaskType, get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
    models,
)
from transformers import set_seed


def encoder(directory: Path | None) -> SentenceTransformer:
    """The model in ``directory``, or a small random one."""
    if directory is not None:
        return SentenceTransformer(str(directory))
    with TemporaryDirectory() as folder:
        tiny.bert().save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        words = models.Transformer(folder, max_seq_length=32)
    return SentenceTransformer(
        modules=[words, models.Pooling(words.get_word_embedding_dimension())], device="cpu"
    )


def pairs() -> Dataset:
    """Sentences are alike as far as animals and doing agree."""
    lines = tiny.sentences()
    first, second = lines[::2], lines[1::2]
    words = [(set(a.split()), set(b.split())) for a, b in zip(first, second, strict=True)]
    scores = [len(a & b) / len(a | b) for a, b in words]
    return Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="directory of a model; default: a small random one")
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--rank", type=int, default=3, help="average rank at the end")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    set_seed(0)
    model = encoder(options.model)
    config = increlora_rs.IncreLoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=options.rank,
        lora_alpha=16,
        target_modules=["query", "value"],
    )
    # The layers are put into the very model that `model` holds.
    adapted = get_peft_model(model[0].auto_model, config)
    growth = increlora_rs.IncreLoraCallback()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(options.out / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            save_strategy="no",
            report_to="none",
            logging_steps=20,
            use_cpu=True,
        ),
        train_dataset=pairs(),
        loss=losses.CosineSimilarityLoss(model),
        callbacks=[growth],
    )
    trainer.train()
    adapted.save_pretrained(options.out)
    print(f"parameters {growth.scheduler.spent} of {growth.scheduler.budget}")


if __name__ == "__main__":
    main()
