"""How far two ways of computing the same may be apart.

Eager mode, a compiled graph, a merged weight hand the same numbers to a BLAS in other products, and which
kernel it takes, and so how it rounds, differs by machine. Bits are compared within one way only.
"""

import pytest
import torch


def assert_near(found, wanted, dtype=torch.float32):
    """Within some units in the last place of ``dtype``, relative to the largest entry: what other products
    leave of one pass through a few layers. Fewer in bfloat16, whose products are summed in float32."""
    assert found.dtype == wanted.dtype
    units = 3 if dtype == torch.bfloat16 else 50
    bound = units * torch.finfo(dtype).eps * float(wanted.detach().abs().max())
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=bound)


def assert_same_growth(history, wanted):
    """The same steps, modules and ranks; scores that rounding alone makes differ, 100 times what float32
    leaves after some 40 steps."""
    assert [tuple(row)[:3] for row in history] == [tuple(row)[:3] for row in wanted]
    assert [row[3] for row in history] == pytest.approx([row[3] for row in wanted], rel=1e-4)


def assert_same_training(found, wanted):
    """Parameters of trainings of some 40 steps. Adam divides by the size of a gradient, so that of the
    smallest ones rounding becomes a part of a step of 0.01."""
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
