"""What nothing costs: a layer without components beside the frozen one, and a step whose components are all
in the upper third of the model beside PEFT's LoRA in all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from increlora_rs import IncreLoraConfig, attach
from peft import LoraConfig, get_peft_model
from rich.progress import track
from torch import Tensor, nn

from .methods import ALPHA, FROZEN, LORA, PRECISIONS, TARGETS, Projections, Regression, batch
from .sizes import Size
from .step import adamw
from .timing import Samples, interleave, processor

EMPTY, UPPER = "without components", "components in the upper third"
_TOTAL_STEPS = 10_000
# Of the pattern that gives every other module none.
_NONE = {".*": 0}


def measure(size: Size) -> dict[str, Any]:
    """Samples in milliseconds of processor time: ``layers`` by shape, ``steps`` by precision."""
    shapes = {(case.shape, case.tokens) for case in size.layer_cases}
    cases = [(*case, precision) for case in sorted(shapes) for precision in size.precisions]
    return {
        "layers": [_layers(size, *case) for case in track(cases, description="nothing: layers")],
        "steps": [
            _steps(size, precision, size.dropouts[-1])
            for precision in track(size.precisions, description="nothing: whole steps")
        ],
    }


def _rounded(samples: Samples) -> Samples:
    return {name: [round(value, 4) for value in values] for name, values in samples.items()}


def _layers(size: Size, shape: tuple[int, int], tokens: int, precision: str) -> dict[str, Any]:
    dtype, device = PRECISIONS[precision].base, size.device
    x = torch.randn(tokens, shape[0], dtype=dtype, device=device, requires_grad=True)
    gy = torch.randn(tokens, shape[1], dtype=dtype, device=device)

    def call(*, adapted: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        host = Projections(*shape).to(device, dtype).requires_grad_(False)
        if adapted:
            targets = r"projections\.0"
            config = IncreLoraConfig(
                r=size.rank, lora_alpha=ALPHA, lora_dropout=0.1, target_modules=targets, rank_pattern=_NONE
            )
            get_peft_model(host, config)
        layer = host.train().projections[0]

        def forward_backward() -> None:
            x.grad = None
            layer(x).backward(gy)

        return forward_backward

    calls = {FROZEN: call(adapted=False), EMPTY: call(adapted=True)}
    samples = interleave(calls, seconds=size.seconds, rounds=size.rounds, clock=processor)
    return {"shape": list(shape), "tokens": tokens, "precision": precision, "ms": _rounded(samples)}


def upper_third(size: Size) -> dict[str, int]:
    """The rank pattern of as many components as ``size.rank`` everywhere makes, all in the upper third."""
    count = -(-size.layers // 3)
    upper = "|".join(str(block) for block in range(size.layers - count, size.layers))
    return {rf".*layer\.({upper})\..*": size.rank * size.layers // count} | _NONE


def _steps(size: Size, precision: str, dropout: float) -> dict[str, Any]:
    embeddings, target = batch(size, PRECISIONS[precision])
    # As those of a model that is adapted: nothing before the first component is trained.
    embeddings = embeddings.detach()
    common: dict[str, Any] = {"lora_alpha": ALPHA, "lora_dropout": dropout, "target_modules": list(TARGETS)}

    def call(config: LoraConfig) -> Callable[[], None]:
        torch.manual_seed(0)
        with torch.device(size.device):
            host: nn.Module = Regression(size).to(PRECISIONS[precision].base)
        widen = PRECISIONS[precision].adapter == torch.float32
        model = get_peft_model(host, config, autocast_adapter_dtype=widen).to(size.device).train()
        optimizer = adamw(model)
        if isinstance(config, IncreLoraConfig):
            attach(model, optimizer, total_steps=_TOTAL_STEPS)
        return lambda: _step(model, optimizer, embeddings, target)

    pattern = upper_third(size)
    calls = {
        LORA: call(LoraConfig(r=size.rank, **common)),
        UPPER: call(IncreLoraConfig(r=size.rank, rank_pattern=pattern, **common)),
    }
    samples = interleave(
        calls, seconds=size.step_seconds, rounds=size.rounds, warmup=size.step_warmup, clock=processor
    )
    return {"precision": precision, "dropout": dropout, "ms": _rounded(samples)}


def _step(model: Any, optimizer: torch.optim.Optimizer, embeddings: Tensor, target: Tensor) -> None:
    optimizer.zero_grad()
    model(embeddings, target).loss.backward()
    optimizer.step()
