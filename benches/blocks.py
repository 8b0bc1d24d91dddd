"""MELoRA and MoRA in the linear layers of a BERT block, forward and backward, beside PEFT's LoRA of as many
parameters and beside themselves as their authors compute them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from increlora_rs import MeLoraConfig, MoraConfig
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.progress import track
from torch import Tensor, nn

from .layer import trainable
from .methods import ALPHA, FROZEN, LORA, PRECISIONS, Precision
from .published import LiteralSquare, LoopedSlices
from .sizes import Size
from .timing import interleave

#: Ours, and the same as published.
PAIRS = {
    "MELoRA, 2 slices": "loop over 2",
    "MELoRA, 8 slices": "loop over 8",
    "MoRA 1": "MoRA 1, literal",
    "MoRA 6": "MoRA 6, literal",
}
_CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    LORA: lambda **common: LoraConfig(lora_alpha=ALPHA, **common),
    "MELoRA, 2 slices": lambda **common: MeLoraConfig(lora_alpha=ALPHA, n_slices=2, **common),
    "MELoRA, 8 slices": lambda **common: MeLoraConfig(lora_alpha=ALPHA, n_slices=8, **common),
    "MoRA 1": lambda **common: MoraConfig(mora_type=1, **common),
    "MoRA 6": lambda **common: MoraConfig(mora_type=6, **common),
}
_LITERAL: dict[str, Callable[..., nn.Module]] = {
    "loop over 2": lambda base, **options: LoopedSlices(base, slices=2, alpha=ALPHA, **options),
    "loop over 8": lambda base, **options: LoopedSlices(base, slices=8, alpha=ALPHA, **options),
    "MoRA 1, literal": lambda base, **options: LiteralSquare(base, form=1, **options),
    "MoRA 6, literal": lambda base, **options: LiteralSquare(base, form=6, **options),
}
METHODS = (FROZEN, *_CONFIGS, *_LITERAL)


class Block(nn.Module):
    """The linear layers of a block without what is between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        result: Tensor = self.down(self.up(self.output(self.query(x) + self.key(x) + self.value(x))))
        return result


def measure(size: Size) -> list[dict[str, Any]]:
    """A record a precision and dropout: the samples in milliseconds of every method."""
    cases = [(precision, dropout) for precision in size.precisions for dropout in size.dropouts]
    return [_case(size, *case) for case in track(cases, description="blocks")]


def _case(size: Size, precision: str, dropout: float) -> dict[str, Any]:
    calls = {name: call(name, size, precision, dropout) for name in METHODS}
    samples = interleave(calls, seconds=4 * size.seconds, rounds=size.rounds)
    return {
        "precision": precision,
        "dropout": dropout,
        "ms": {name: [round(value, 3) for value in values] for name, values in samples.items()},
    }


def call(method: str, size: Size, precision: str, dropout: float) -> Callable[[], object]:
    """Forward and backward of a block, with the gradients for its input and its adapters."""
    block = adapted(method, size, PRECISIONS[precision], dropout)
    shape, dtype = (size.batch * size.tokens, size.width), PRECISIONS[precision].base
    x, gy = (torch.randn(shape, device=size.device).to(dtype) for _ in range(2))
    x.requires_grad_()
    wanted = [x, *trainable(block)]
    return lambda: torch.autograd.grad(block(x), wanted, gy)


def adapted(method: str, size: Size, precision: Precision, dropout: float) -> nn.Module:
    """A block, adapted by ``method``, training; an update that is not 0."""
    torch.manual_seed(0)
    with torch.device(size.device):
        block: nn.Module = Block(size.width).to(precision.base).requires_grad_(False)
    names = [name for name, _ in block.named_children()]
    if method in _LITERAL:
        for name in names:
            literal = _LITERAL[method](
                block.get_submodule(name), rank=size.rank, dropout=dropout, dtype=precision.adapter
            )
            setattr(block, name, literal)
    elif method != FROZEN:
        config = _CONFIGS[method](r=size.rank, lora_dropout=dropout, target_modules=names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            widen = precision.adapter == torch.float32
            model: Any = get_peft_model(block, config, autocast_adapter_dtype=widen)
        block = model.get_base_model()
    for parameter in trainable(block):
        nn.init.normal_(parameter, std=0.02)
    return block.to(size.device).train()
