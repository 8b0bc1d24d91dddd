"""The adapted layer, forward and backward, by shape, tokens, precision, dropout and rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from . import methods
from .methods import ADALORA, FROZEN, LITERAL, LORA, OURS, PRECISIONS
from .sizes import LayerCase, Size
from .timing import interleave, joined, ratio

# Ours over LoRA's time that one bar tests, and how near to it a first measurement is not trusted.
NOT_SLOWER = 1.03
_DOUBTFUL = 0.06
# The literal method's cost is known well enough from the smaller cases.
_MOST_TOKENS_OF_LITERAL = 1024


def measure(size: Size) -> list[dict[str, Any]]:
    """A record for each case: its description and the samples in milliseconds of every method."""
    cases = [
        (case, precision, dropout)
        for case in size.layer_cases
        for precision in size.precisions
        for dropout in size.dropouts
    ]
    return [_case(size, *case) for case in track(cases, description="layer")]


def _case(size: Size, case: LayerCase, precision: str, dropout: float) -> dict[str, Any]:
    names = [FROZEN, LORA, ADALORA, OURS]
    if case.tokens <= _MOST_TOKENS_OF_LITERAL:
        names.append(LITERAL)
    calls = {name: call(name, case, precision, dropout, size.device) for name in names}
    samples = interleave(calls, seconds=size.seconds, rounds=size.rounds)
    if abs(ratio(samples, OURS, LORA) - NOT_SLOWER) < _DOUBTFUL:
        # On either side of the bar, so that the second look favours neither verdict.
        more = interleave(calls, seconds=2 * size.seconds, rounds=size.rounds, seed=1)
        samples = joined(samples, more)
    return {
        "shape": list(case.shape),
        "tokens": case.tokens,
        "rank": case.rank,
        "precision": precision,
        "dropout": dropout,
        "ms": {name: [round(value, 4) for value in values] for name, values in samples.items()},
    }


def call(method: str, case: LayerCase, precision: str, dropout: float, device: str) -> Callable[[], object]:
    """Forward and backward of one layer, with the gradients for its input and its adapter."""
    (layer,) = methods.adapted_layers(
        method,
        case.shape,
        precision=PRECISIONS[precision],
        rank=case.rank,
        dropout=dropout,
        device=device,
    )
    dtype = PRECISIONS[precision].base
    x, gy = (torch.randn(case.tokens, width, device=device).to(dtype) for width in case.shape)
    x.requires_grad_()
    wanted = [x, *trainable(layer)]
    return lambda: torch.autograd.grad(layer(x), wanted, gy)


def trainable(module: nn.Module) -> list[Tensor]:
    """Parameters that want a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
