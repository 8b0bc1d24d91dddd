"""One run of an arm on a bed: a plain loop with AdamW, random numbers that all arms have in common."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from increlora_rs import attach
from increlora_rs.compare.methods import Method
from increlora_rs.compare.training import count_parameters, final_ranks
from increlora_rs.contract.config import MethodConfig
from increlora_rs.support.names import short
from increlora_rs.support.seeded import generator
from peft import PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from .arms import SOURCE, Prepared, Setting, prepare
from .bed import Bed
from .spectra import component_energies

_ADAPTER = "default"


def train(
    bed: Bed,
    arm: Method,
    *,
    r: float,
    alpha: float,
    lr: float,
    warmup: float,
    seed: int,
    given: Mapping[str, int],
) -> dict[str, Any]:
    """Trains and measures.

    Returns:
        ``score``; ``parameters``: at their ``peak`` and ``final``, of components that count; ``ranks``;
        ``share`` of the components in planted modules (None where none is planted); ``seconds``; for the
        source of the ceiling's ranks ``spectra`` besides.

    Raises:
        ValueError: an option of the arm is wrong, or the loss became infinite.
    """
    start = time.perf_counter()
    prepared = prepare(arm, Setting(r, alpha, bed.sizes, seed, given))
    model = get_peft_model(bed.model(), prepared.config)
    draw_alike(model, prepared.config, seed)
    torch.manual_seed(seed)
    peak, ranks = _fit(bed, model, prepared, lr, warmup)
    ranks = final_ranks(model) | ranks
    final = count_parameters(model, ranks)["adapter"]
    model.eval()
    record: dict[str, Any] = {
        "score": bed.score(model, final),
        "parameters": {"peak": peak, "final": final},
        "ranks": ranks,
        "share": share_in(bed.planted, ranks),
    }
    if arm.name == SOURCE:
        record["spectra"] = component_energies(model, bed.observe)
    return record | {"seconds": time.perf_counter() - start}


def draw_alike(model: nn.Module, config: PeftConfig, seed: int) -> None:
    """Draws LoRA's first A by module and seed alone: the rows that two arms both have are equal."""
    if getattr(config, "init_lora_weights", None) is not True:
        return
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or _ADAPTER not in layer.lora_A:
            continue
        a = layer.lora_A[_ADAPTER].weight
        # Kaiming uniform with a = sqrt(5), row after row.
        bound = 1.0 / math.sqrt(a.shape[1])
        drawn = torch.empty(a.shape).uniform_(-bound, bound, generator=generator(seed, "A", short(name)))
        with torch.no_grad():
            a.copy_(drawn)


def share_in(planted: frozenset[str], ranks: Mapping[str, int]) -> float | None:
    """Share of the components that sit in ``planted``; None where nothing is planted."""
    if not planted:
        return None
    return sum(rank for name, rank in ranks.items() if name in planted) / max(sum(ranks.values()), 1)


def _fit(
    bed: Bed, model: nn.Module, prepared: Prepared, lr: float, warmup: float
) -> tuple[int, dict[str, int]]:
    """Trains; gives the most parameters that were trained at a time, and the ranks that a policy tells."""
    optimizer = torch.optim.AdamW(_groups(model, prepared.rates, lr), lr=lr, weight_decay=0.0)
    warm = max(1, round(warmup * bed.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, warm, bed.steps))
    scheduler = None
    if isinstance(prepared.config, MethodConfig) and prepared.config.policy is not None:
        scheduler = attach(
            model, optimizer, total_steps=bed.steps, lr_warmup_steps=warm, policy=prepared.policy
        )
    peak = 0
    model.train()
    for step in range(bed.steps):
        loss = bed.loss(model, step)
        loss.backward()
        # Before the step: what an event takes away has been trained until now.
        peak = max(peak, sum(p.numel() for group in optimizer.param_groups for p in group["params"]))
        optimizer.step()
        with warnings.catch_warnings():
            # Torch takes the first step for one left out where another's hook wraps it.
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            schedule.step()
        optimizer.zero_grad()
    last = loss.item()
    if not math.isfinite(last):
        raise ValueError(f"the loss of the last step is {last}: lr={lr} is too high.")
    return peak, {} if scheduler is None else dict(scheduler.ranks)


def _rate(step: int, warm: int, steps: int) -> float:
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm + 1)


def _groups(model: nn.Module, rates: Mapping[str, float], lr: float) -> list[dict[str, Any]]:
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = next((value for factor, value in rates.items() if f".{factor}." in name), 1.0)
            by_rate.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": lr * rate} for rate, parameters in by_rate.items()]
