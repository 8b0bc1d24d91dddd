"""One run: a method trained on a task by Trainer, and what is kept of it."""

from __future__ import annotations

import math
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from ..layers import AdaptedLayer
from ..support.names import short
from ..training.callback import IncreLoraCallback
from .base_model import BaseModel
from .callbacks import StepClock
from .memory import PeakMemory
from .methods import E, Method, Setting
from .metrics import measure, official
from .results import Record
from .tasks import Task

_ADAPTER = "default"
_PACKAGES = ("increlora_rs", "torch", "transformers", "peft", "accelerate")
# Steps at the start that the time of a step leaves out, where there are enough.
_WARM_UP = 5


def steps_of(rows: int, config: dict[str, Any]) -> int:
    """Optimizer steps of a training on so many rows."""
    return math.ceil(rows / config["batch"]) * int(config["epochs"])


def train(
    method: Method,
    config: dict[str, Any],
    task: Task,
    base: BaseModel,
    given: dict[str, int],
    advance: Callable[[], None],
) -> Record:
    """Trains and measures.

    Args:
        method: The method.
        config: All that determines the result, as the command makes it.
        given: Final ranks of another run, for methods that start with them.
        advance: Called after every optimizer step.

    Returns:
        ``epochs`` (the metrics on the development set after each), ``losses`` (there, likewise), ``test``,
        ``parameters``, ``ranks``, ``total_rank``, ``budget``, ``seconds_a_step`` (median),
        ``peak_bytes`` (None where it is not known), ``seconds``, ``versions``, ``device``, ``threads``.
    """
    start = time.perf_counter()
    shared = {name: config[name] for name in ("lora_alpha", "lora_dropout", "target_modules")}
    steps = steps_of(len(task.train), config)
    sized = config.get("sized", {})
    prepared = method.prepare(Setting(config["r"], steps, config["seed"], shared, given, sized))
    memory = PeakMemory()
    model = get_peft_model(base.classifier(task, config["seed"], config["base_dropout"]), prepared.config)
    data = task.encoded(base.tokenizer, config["max_length"])
    clock, names = StepClock(advance), official(task)

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        outputs, gold = (np.asarray(part) for part in (prediction.predictions, prediction.label_ids))
        return measure(names, outputs, gold)

    with tempfile.TemporaryDirectory() as folder:
        trainer = _Trainer(
            prepared.e_lr,
            model=model,
            args=_arguments(folder, config),
            train_dataset=data["train"],
            eval_dataset=_by_length(data["dev"]),
            data_collator=DataCollatorWithPadding(base.tokenizer),
            compute_metrics=metrics,
            callbacks=[*prepared.callbacks, clock, memory],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logged = [log for log in trainer.state.log_history if "eval_loss" in log]
        test = trainer.predict(_by_length(data["test"])).metrics if data["test"] else {}
    ranks = final_ranks(model) | _told_ranks(prepared.callbacks)
    seconds = clock.seconds[_WARM_UP:] if len(clock.seconds) > 2 * _WARM_UP else clock.seconds
    return {
        "epochs": [{name: log[f"eval_{name}"] for name in names} for log in logged],
        "losses": [log["eval_loss"] for log in logged],
        "test": {name: test[f"test_{name}"] for name in names} if test else None,
        "parameters": count_parameters(model, ranks),
        "ranks": ranks,
        "total_rank": sum(ranks.values()),
        "budget": sized.get("r", config["r"]) * len(ranks),
        "steps": len(clock.seconds),
        "seconds_a_step": float(np.median(seconds)),
        "peak_bytes": memory.bytes,
        "seconds": time.perf_counter() - start,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def _by_length(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # Less padding; no metric asks for the order.
    return sorted(examples, key=lambda example: len(example["input_ids"]))


def final_ranks(model: nn.Module) -> dict[str, int]:
    """Rank of every adapted module by full name; AdaLoRA's are its components that are not masked."""
    return {short(name): _rank(layer) for name, layer in _adapted(model).items()}


def _told_ranks(callbacks: list[Any]) -> dict[str, int]:
    """The ranks that count, by the schedulers of methods that change them."""
    told: dict[str, int] = {}
    for callback in callbacks:
        if isinstance(callback, IncreLoraCallback) and callback.scheduler is not None:
            told |= callback.scheduler.ranks
    return told


def count_parameters(model: nn.Module, ranks: dict[str, int]) -> dict[str, int]:
    """Trainable numbers: ``adapter`` (those of the components that are left at the end), ``held`` (with
    those that are masked but still trained) and ``head`` (the classifier).

    Args:
        ranks: What is left, by module.
    """
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trainable.items() if ".modules_to_save." in name)
    held = sum(trainable.values()) - head
    masked = sum(_masked(layer, ranks[short(name)]) for name, layer in _adapted(model).items())
    return {"adapter": held - masked, "held": held, "head": head}


def _adapted(model: nn.Module) -> dict[str, LoraLayer]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and _ADAPTER in module.r
    }


def _rank(layer: LoraLayer) -> int:
    if isinstance(layer, AdaLoraLayer):
        return int(torch.count_nonzero(layer.lora_E[_ADAPTER]))
    return int(layer.r[_ADAPTER])


def _masked(layer: LoraLayer, left: int) -> int:
    """Numbers of a layer that are trained and do not count, of rank ``left`` at the end."""
    if isinstance(layer, AdaptedLayer):
        config = layer.configs[_ADAPTER]
        shapes = [layer.structure.shapes(layer.site, rank, config) for rank in (layer.rank(_ADAPTER), left)]
        held, counts = (sum(map(math.prod, of_rank.values())) for of_rank in shapes)
        return held - counts
    if isinstance(layer, AdaLoraLayer):
        factors = (layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER], layer.lora_E[_ADAPTER])
        rank = int(layer.lora_E[_ADAPTER].numel())
        return sum(factor.numel() for factor in factors) // rank * (rank - left)
    return 0


def _arguments(folder: str, config: dict[str, Any]) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=config["epochs"],
        per_device_train_batch_size=config["batch"],
        per_device_eval_batch_size=64,
        # Less padding, for all methods alike.
        train_sampling_strategy="group_by_length",
        bf16=config["precision"] == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        learning_rate=config["lr"],
        # A share of the steps, below 1.
        warmup_steps=config["warmup"],
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=config["seed"],
    )


class _Trainer(Trainer):
    """Trains E at ``e_lr`` times the learning rate."""

    def __init__(self, e_lr: float, **arguments: Any) -> None:
        self._e_lr = e_lr
        super().__init__(**arguments)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's optimizer; E in groups of its own if its learning rate is."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self._e_lr == 1.0:
            return optimizer
        e = {id(p) for name, p in self.model.named_parameters() if f".{E}." in name}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in e]
            if own:
                group["params"] = [p for p in group["params"] if id(p) not in e]
                optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * self._e_lr})
        return optimizer
