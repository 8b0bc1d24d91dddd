"""E of all modules observed in one call (`Fluctuation` of src/policies/fluctuation.rs) against the formula in
torch.
"""

import pytest
import torch
from increlora_rs import _core
from torch import nn

RATE = 0.1


def sums(count):
    return [torch.zeros(count, dtype=torch.float64) for _ in range(3)]


def leaves(ranks, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = [nn.Parameter(torch.randn(rank, 1, generator=generator).to(dtype)) for rank in ranks]
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return found


def observed_by_torch(parameters, vectors, scale=None):
    """By the same formula in torch, whose numbers are the same to the last bit."""
    mean, squares, steps = vectors
    slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    effects = [p.detach().double() * slope.double() for p, slope in zip(parameters, slopes, strict=True)]
    effect = torch.cat(effects).view(-1)
    effect = effect if scale is None else effect / scale.double()
    if not effect.isfinite().all():
        return
    weight = (1 / (steps + 1)).clamp(min=RATE)
    apart = effect - mean
    squares += apart.square() * (1 - weight)
    mean += apart * weight
    steps += 1


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [None, 3.0])
def test_the_leaves_own_gradients_are_taken_in_bit_for_bit(dtype, scale):
    scale = None if scale is None else torch.tensor([scale])
    parameters = leaves((3, 0, 2, 1), dtype)
    found, wanted = sums(6), sums(6)
    components = _core.Fluctuation(parameters)
    for step in range(15):
        for parameter, other in zip(parameters, leaves((3, 0, 2, 1), dtype, step), strict=True):
            parameter.grad = other.grad
        if step == 4:
            parameters[2].grad = None
        if step == 7:
            parameters[0].grad[1] = torch.inf
        components.observe_(*found, RATE, grad_scale=scale)
        observed_by_torch(parameters, wanted, scale)
    assert same(found, wanted)
    assert found[2].tolist() == [14.0] * 6


def test_a_parameter_that_changed_its_size_in_place_is_read_at_its_new_one():
    parameters = leaves((2, 3), torch.float32)
    components = _core.Fluctuation(parameters)
    components.observe_(*sums(5), RATE)
    parameters[0].grad = None
    with torch.no_grad():
        parameters[0].set_(torch.randn(4, 1))
    parameters[0].grad = torch.randn(4, 1)
    found, wanted = sums(7), sums(7)
    components.observe_(*found, RATE)
    observed_by_torch(parameters, wanted)
    assert same(found, wanted)


def test_modules_of_several_dtypes_are_observed_together():
    parameters = [leaf for dtype in (torch.float32, torch.bfloat16) for leaf in leaves((2, 1), dtype)]
    found, wanted = sums(6), sums(6)
    _core.Fluctuation(parameters).observe_(*found, RATE)
    observed_by_torch(parameters, wanted)
    assert same(found, wanted)


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="values is empty"):
        _core.Fluctuation([])
    with pytest.raises(TypeError, match=r"values\[1\]"):
        _core.Fluctuation([torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int64)])
    with pytest.raises(ValueError, match="mean"):
        _core.Fluctuation(leaves((2, 1), torch.float32)).observe_(*sums(2), RATE)
    with pytest.raises(ValueError, match="rate"):
        _core.Fluctuation(leaves((2, 1), torch.float32)).observe_(*sums(3), 0.0)
