"""Windows of a long row of tokens, drawn by a seed."""

from __future__ import annotations

import torch
from torch import Tensor


def windows(tokens: Tensor, rows: int, length: int, lots: torch.Generator) -> Tensor:
    """Windows of ``length`` tokens, (rows, length), each from anywhere in ``tokens``, of one dimension."""
    starts = torch.randint(0, len(tokens) - length + 1, (rows,), generator=lots)
    return tokens[starts[:, None] + torch.arange(length)]
