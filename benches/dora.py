"""DoRA beside LoRA, ours and PEFT's: forward and backward of one adapted linear layer, and what it keeps.

``python -m benches.dora`` prints ratios to the frozen layer's own time. It is no part of ``make bench``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from increlora_rs import IncreLoraConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from .timing import interleave

_RANK = 8
#: Width in and out, tokens, dropout.
_CASES = ((768, 768, 1024, 0.0), (768, 768, 1024, 0.1), (2048, 2048, 1024, 0.0), (2048, 2048, 64, 0.0))
_QUICK = ((256, 256, 64, 0.0),)
_FROZEN = "frozen"
_METHODS = ("PEFT's LoRA", "PEFT's DoRA", "our LoRA", "our DoRA")


def _layer(method: str, features: int, out: int, dropout: float, dtype: torch.dtype) -> nn.Module:
    base = nn.ModuleDict({"only": nn.Linear(features, out, bias=False)}).to(dtype).requires_grad_(False)
    if method == _FROZEN:
        return base["only"]
    options: dict[str, Any] = {"target_modules": ["only"], "use_dora": method.endswith("DoRA")}
    make = IncreLoraConfig if method.startswith("our") else peft.LoraConfig
    model = peft.get_peft_model(base, make(r=_RANK, lora_alpha=_RANK, lora_dropout=dropout, **options))
    layer: nn.Module = model.base_model.model["only"]
    return layer.train()


def _call(layer: nn.Module, x: torch.Tensor, gy: torch.Tensor) -> Callable[[], object]:
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), wanted, gy)


def _kept(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass saves for the backward pass, beside x and the parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # As long as its graph lives no address comes twice.
        held = layer(x)
    return sum(kept.values()) if held.requires_grad else 0


def main(quick: bool = False) -> list[dict[str, Any]]:
    """Measures, prints the table, and gives its rows."""
    warnings.filterwarnings("ignore")
    rows = []
    for features, out, tokens, dropout in _QUICK if quick else _CASES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            layers = {name: _layer(name, features, out, dropout, dtype) for name in (_FROZEN, *_METHODS)}
            x = torch.randn(tokens, features).to(dtype).requires_grad_()
            gy = torch.randn(tokens, out).to(dtype)
            calls = {name: _call(layer, x, gy) for name, layer in layers.items()}
            samples = interleave(calls, seconds=0.05 if quick else 2.0, rounds=(2, 3) if quick else (7, 21))
            frozen = min(samples[_FROZEN])
            row: dict[str, Any] = {"case": f"{features} to {out}, {tokens} tokens, p={dropout}, {dtype}"}
            for name in _METHODS:
                added = min(samples[name]) / frozen - 1.0
                row[name] = f"{added:.2f}, {_kept(layers[name], x) / 2**20:.1f} MiB"
            rows.append(row)
    table = Table(title="added to the frozen layer's time; kept for the backward pass")
    for heading in rows[0]:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row.values())
    Console(width=150).print(table)
    return rows


if __name__ == "__main__":
    main("--quick" in sys.argv)
