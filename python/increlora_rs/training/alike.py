"""Are parameters and gradients that are whole in several processes the same in each of them?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Differences of more than this, of the norm: those of data, and no rounding of a sum in another order.
_WIDE, _NARROW = 1e-3, 2e-2


def differing(tensors: Sequence[Tensor | None]) -> list[int]:
    """Which of ``tensors`` differ between the processes, by more than rounding; the same answer in each.

    Of each tensor a product with fixed numbers is compared, which tells apart what differs by 1e-3 of its
    norm (2e-2 in 16 bits); by chance it may overlook one tensor, and hardly all of an adapter. It waits for
    the device, and five numbers a tensor are added up over the processes.

    Args:
        tensors: Of the same shapes in all processes, dense; None counts as zeros.
    """
    device = next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))
    longest = max((tensor.numel() for tensor in tensors if tensor is not None), default=0)
    # Of no period that the numbers in a matrix could have.
    pattern = torch.arange(1, longest + 1, device=device, dtype=torch.float64).mul_(2.3).cos_()
    facts = torch.stack([_facts(tensor, pattern) for tensor in tensors]).to(device)
    dist.all_reduce(facts)
    count = dist.get_world_size()
    value, square, norm, broken, narrow = facts.cpu().unbind(1)
    spread = square / count - (value / count).square()
    bound = torch.where(narrow > 0, _NARROW, _WIDE).square() * norm / count
    differ = (spread > bound) | ((broken > 0) & (broken < count))
    return torch.nonzero(differ).flatten().tolist()


def _facts(tensor: Tensor | None, pattern: Tensor) -> Tensor:
    """The product with the pattern, its square, the squared norm; is one not finite; are they of 16 bits?"""
    if tensor is None or not tensor.numel():
        return pattern.new_zeros(5)
    wide = torch.promote_types(tensor.dtype, torch.float32)
    flat = tensor.detach().reshape(-1).to(pattern.device, wide)
    value = torch.dot(flat, pattern[: flat.numel()].to(wide)).double()
    norm = torch.dot(flat, flat).double()
    finite = value.isfinite() & norm.isfinite()
    facts = torch.stack([value, value.square(), norm]).where(finite, 0.0)
    narrow = float(tensor.element_size() < 4)
    return torch.cat([facts, torch.stack([(~finite).double(), torch.full_like(norm, narrow)])])
