"""Parameters that many modules share, under reentrant checkpointing.

Such a checkpoint repeats a forward pass within the backward pass, and runs a backward pass of its own through
it. A parameter of one module is in one of these. One that modules of several checkpoints share would get its
gradient in as many parts, each of them added as if it were the last: DistributedDataParallel averages the
first over the processes, and leaves the others to each, without a word. Here the parts are added up by a
stand-in, and the parameter gets their sum when the whole backward pass ends. With ``static_graph=True`` DDP
counts the parts itself, and is through before that end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from .factor import Factor


def in_pass(factor: Factor) -> Tensor:
    """The shared parameter, or what stands for it in the forward pass at hand."""
    weight = factor.weight
    if torch._C._current_graph_task_id() == -1:
        # What is there is of a backward pass that broke off.
        factor.stand_in = None
        ddp = DistributedDataParallel._active_ddp_module
        factor.in_parts = ddp is not None and ddp.static_graph
        return weight
    if factor.in_parts or not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    if factor.stand_in is None:
        factor.stand_in = _stand_in(factor, weight)
    return factor.stand_in


def _stand_in(factor: Factor, weight: Tensor) -> Tensor:
    held = weight.detach().requires_grad_()

    def hand_over() -> None:
        factor.stand_in = None
        # A checkpoint that is not reentrant repeats the forward pass alone.
        if held.grad is not None:
            torch.autograd.backward(weight, held.grad)

    # At the end of the pass that the checkpoint stands in, for its own has not begun.
    Variable._execution_engine.queue_callback(hand_over)
    return held
