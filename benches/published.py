"""MELoRA and MoRA as their papers and published code compute them, in plain PyTorch: a loop over MELoRA's
slices; MoRA's padding, sums, rotation and repetition as tensors of their own.

What increlora_rs is compared with; it shares no code with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LoopedSlices(nn.Module):
    """MELoRA (arXiv 2402.17263): ``base(x) + concat_i(s B_i A_i drop_i(x_i))``, slice by slice.

    Args:
        base: The frozen layer.
        rank: Of each slice.
        slices: Their number.
        alpha: The scale's numerator.
        dropout: Probability with which an element of x is dropped.
        dtype: Of A and B.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        slices: int,
        alpha: float = 16.0,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.width = base.in_features // slices
        out = base.out_features // slices
        self.a = nn.ModuleList(nn.Linear(self.width, rank, bias=False, dtype=dtype) for _ in range(slices))
        self.b = nn.ModuleList(nn.Linear(rank, out, bias=False, dtype=dtype) for _ in range(slices))
        self.drops = nn.ModuleList(nn.Dropout(dropout) for _ in range(slices))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        result: Tensor = self.base(x)
        adapted = x.to(next(self.a.parameters()).dtype)
        parts = []
        for k, (a, b, drop) in enumerate(zip(self.a, self.b, self.drops, strict=True)):
            part = adapted[..., k * self.width : (k + 1) * self.width]
            parts.append(b(a(drop(part))) * self.scale)
        return (result + torch.cat(parts, -1)).to(result.dtype)


class LiteralSquare(nn.Module):
    """MoRA (arXiv 2405.12130), type 1 (eq. 6) or 6 (eq. 9): ``base(x) + decomp(M comp(drop(x)))``.

    Args:
        base: The frozen layer.
        rank: Of the LoRA with as many parameters.
        form: 1 or 6.
        dropout: Probability with which an element of x is dropped.
        dtype: Of M.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        form: int,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        side = math.floor(math.sqrt((base.in_features + base.out_features) * rank) + 0.5)
        self.side = side - side % 2 if form == 6 else side
        self.form, self.drop = form, nn.Dropout(dropout)
        self.m = nn.Linear(self.side, self.side, bias=False, dtype=dtype)
        blocks = -(-base.in_features // self.side)
        places = torch.arange(0, self.side, 2) / self.side
        angles = torch.outer(torch.arange(blocks).float(), 10000.0**-places)
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos().to(dtype))
        self.register_buffer("sin", angles.sin().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        result: Tensor = self.base(x)
        x = self.drop(x.to(self.m.weight.dtype))
        missing = -x.shape[-1] % self.side
        if missing:
            x = torch.cat([x, x[..., :missing]], -1)
        x = x.view(*x.shape[:-1], -1, self.side)
        if self.form == 6:
            first, second = x.chunk(2, -1)
            x = x * self.cos + torch.cat([-second, first], -1) * self.sin
            update = self.m(x).flatten(-2)
        else:
            update = self.m(x.sum(-2))
        if update.shape[-1] < result.shape[-1]:
            update = torch.cat([update] * -(-result.shape[-1] // update.shape[-1]), -1)
        return (result + update[..., : result.shape[-1]]).to(result.dtype)
