"""The methods that need all modules of a model at once: LoRTA beside PEFT's LoRA and beside itself with
every update built, in the four projections of attention; PRILoRA's whole step beside PEFT's LoRA of the same
ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from increlora_rs import LortaConfig, PriLoraConfig, attach
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.progress import track
from torch import Tensor, nn

from .layer import trainable
from .methods import ALPHA, FROZEN, LORA, PRECISIONS, TARGETS, Precision, Regression, batch
from .sizes import Size
from .step import adamw, forward_backward
from .timing import Samples, interleave

DENSE, LORTA, PRILORA = "LoRTA, updates built", "LoRTA", "PRILoRA"
KINDS = ("query", "key", "value", "output")
_HEAD = 64


def measure(size: Size) -> dict[str, Any]:
    """Samples in milliseconds: ``passes`` of the projections, ``steps`` of the model, by precision."""
    cases = [(precision, dropout) for precision in size.precisions for dropout in size.dropouts]
    return {
        "passes": [_passes(size, *case) for case in track(cases, description="depth: projections")],
        "steps": [
            _steps(size, precision, size.dropouts[-1])
            for precision in track(size.precisions, description="depth: whole steps")
        ],
    }


def _record(precision: str, dropout: float, samples: Samples) -> dict[str, Any]:
    rounded = {name: [round(value, 3) for value in values] for name, values in samples.items()}
    return {"precision": precision, "dropout": dropout, "ms": rounded}


# LoRTA.


class Attention(nn.Module):
    """The projections of an attention without the attention: all three go into the fourth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in KINDS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        result: Tensor = self.output(self.query(x) + self.key(x) + self.value(x))
        return result


class Projections(nn.Module):
    """Those of all layers, one after the other."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Attention(size.width) for _ in range(size.layers))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        for layer in self.layer:
            x = layer(x)
        return x


class DenseLorta(nn.Module):
    """``base(x) + s drop(x) D``, or with D's transpose, where D is built from the five tensors at every pass.

    As the authors do it, but in the orientation of ours; it shares no code with it.

    Args:
        base: The frozen layer.
        tensors: A (d, r), B (r, d / H), C_h (H, r), C_l (L, r) and C_m (4, r).
        layer, kind: Rows of C_l and C_m.
        dropout: Probability with which an element of x is dropped.
    """

    def __init__(
        self, base: nn.Linear, tensors: nn.ParameterList, layer: int, kind: int, dropout: float
    ) -> None:
        super().__init__()
        self.base, self.tensors, self.layer, self.kind = base.requires_grad_(False), tensors, layer, kind
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        a, b, of_heads, of_layers, of_kinds = self.tensors
        c = of_heads * of_layers[self.layer] * of_kinds[self.kind]
        blocks = (a * c.unsqueeze(1)) @ b
        d = blocks.transpose(0, 1).flatten(1)
        d = d.t() if self.kind == KINDS.index("output") else d
        update: Tensor = self.dropout(x).to(d.dtype) @ d * (ALPHA / a.shape[1])
        result: Tensor = self.base(x)
        return result + update.to(result.dtype)


def projections(method: str, size: Size, precision: Precision, dropout: float) -> nn.Module:
    """:class:`Projections`, adapted by ``method``, training."""
    torch.manual_seed(0)
    with torch.device(size.device):
        model: nn.Module = Projections(size).to(precision.base)
    if method == FROZEN:
        return model.requires_grad_(False)
    if method == DENSE:
        return _dense(model, size, precision, dropout)
    common: dict[str, Any] = {
        "r": size.rank,
        "lora_alpha": ALPHA,
        "lora_dropout": dropout,
        "target_modules": list(KINDS),
    }
    config: PeftConfig = LoraConfig(**common)
    if method == LORTA:
        config = LortaConfig(heads=_heads(size), after_heads=["output"], **common)
    widen = precision.adapter == torch.float32
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=widen)
    return adapted.to(size.device).train()


def _heads(size: Size) -> int:
    return max(1, size.width // _HEAD)


def _dense(model: nn.Module, size: Size, precision: Precision, dropout: float) -> nn.Module:
    model.requires_grad_(False)
    r, heads = size.rank, _heads(size)
    shapes = ((size.width, r), (r, size.width // heads), (heads, r), (size.layers, r), (len(KINDS), r))
    bound = 1 / math.sqrt(r)
    tensors = nn.ParameterList(
        torch.empty(shape, device=size.device, dtype=precision.adapter).uniform_(-bound, bound)
        for shape in shapes
    )
    for number, layer in enumerate(model.get_submodule("layer").children()):
        for kind, name in enumerate(KINDS):
            setattr(layer, name, DenseLorta(getattr(layer, name), tensors, number, kind, dropout))
    return model.train()


def _passes(size: Size, precision: str, dropout: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    shape, dtype = (size.batch * size.tokens, size.width), PRECISIONS[precision].base
    x, gy = (torch.randn(shape, generator=generator).to(size.device, dtype) for _ in range(2))
    x.requires_grad_()

    def call(method: str) -> Callable[[], object]:
        model = projections(method, size, PRECISIONS[precision], dropout)
        # A model has a parameter once, however many of its layers hold it.
        wanted = [x, *trainable(model)]
        return lambda: torch.autograd.grad(model(x), wanted, gy)

    calls = {method: call(method) for method in (FROZEN, LORA, DENSE, LORTA)}
    samples = interleave(calls, seconds=size.step_seconds / 2, rounds=size.rounds, warmup=size.step_warmup)
    return _record(precision, dropout, samples)


# PRILoRA.


def _steps(size: Size, precision: str, dropout: float) -> dict[str, Any]:
    kind = PRECISIONS[precision]
    data = batch(size, kind)
    common: dict[str, Any] = {
        "lora_alpha": ALPHA,
        "lora_dropout": dropout,
        "target_modules": list(TARGETS),
    }

    def step(config: PeftConfig) -> tuple[Callable[[], None], Any]:
        torch.manual_seed(0)
        with torch.device(size.device):
            base = Regression(size).to(kind.base)
        widen = kind.adapter == torch.float32
        model: Any = get_peft_model(base, config, autocast_adapter_dtype=widen).to(size.device).train()
        optimizer = adamw(model)
        if isinstance(config, PriLoraConfig):
            attach(model, optimizer)

        def call() -> None:
            forward_backward(model, data)
            optimizer.step()

        return call, model

    # Pruning in every round: a training prunes in one step of 40.
    ours, model = step(PriLoraConfig(r=size.rank, prune_every=1, **common))
    ranks = model.peft_config["default"].rank_pattern
    theirs, _ = step(LoraConfig(r=size.rank, rank_pattern=ranks, **common))
    seldom, _ = step(PriLoraConfig(r=size.rank, **common))
    calls = {LORA: theirs, PRILORA: seldom, f"{PRILORA}, pruning": ours}
    samples = interleave(calls, seconds=size.step_seconds, rounds=size.rounds, warmup=size.step_warmup)
    return _record(precision, dropout, samples)
