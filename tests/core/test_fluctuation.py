"""E of all modules observed in one call (`Fluctuation` of src/policies/fluctuation.rs) against the formula in
torch.
"""

import pytest
import torch
from increlora_rs import _core
from torch import nn

RATES = {"mean_rate": 0.1, "square_rate": 0.05}


def zeros(count):
    return [torch.zeros(count, dtype=torch.float64) for _ in range(3)]


def leaves(ranks, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = [nn.Parameter(torch.randn(rank, 1, generator=generator).to(dtype)) for rank in ranks]
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return found


def observed_by_torch(parameters, vectors):
    """By the same formula in torch."""
    mean, squares, steps = vectors
    slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    effects = [p.detach().double() * slope.double() for p, slope in zip(parameters, slopes, strict=True)]
    effect = torch.cat(effects).view(-1)
    if not effect.isfinite().all():
        return
    weight = (1 / (steps + 1)).clamp(min=RATES["mean_rate"])
    share = (1 / steps.clamp(min=1)).clamp(min=RATES["square_rate"])
    apart = effect / effect.square().mean().sqrt() - mean
    squares += share * (apart.square() * (1 - weight) - squares)
    mean += apart * weight
    steps += 1


def same(one, other):
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_leaves_own_gradients_are_taken_in(dtype):
    parameters = leaves((3, 0, 2, 1), dtype)
    found, wanted = zeros(6), zeros(6)
    components = _core.Fluctuation(parameters)
    for step in range(15):
        for parameter, other in zip(parameters, leaves((3, 0, 2, 1), dtype, step), strict=True):
            parameter.grad = other.grad
        if step == 4:
            parameters[2].grad = None
        if step == 7:
            parameters[0].grad[1] = torch.inf
        components.observe_(*found, **RATES)
        observed_by_torch(parameters, wanted)
    assert same(found, wanted)
    assert found[2].tolist() == [14.0] * 6


def test_a_parameter_that_changed_its_size_in_place_is_read_at_its_new_one():
    parameters = leaves((2, 3), torch.float32)
    components = _core.Fluctuation(parameters)
    components.observe_(*zeros(5), **RATES)
    parameters[0].grad = None
    with torch.no_grad():
        parameters[0].set_(torch.randn(4, 1))
    parameters[0].grad = torch.randn(4, 1)
    found, wanted = zeros(7), zeros(7)
    components.observe_(*found, **RATES)
    observed_by_torch(parameters, wanted)
    assert same(found, wanted)


def test_modules_of_several_dtypes_are_observed_together():
    parameters = [leaf for dtype in (torch.float32, torch.bfloat16) for leaf in leaves((2, 1), dtype)]
    found, wanted = zeros(6), zeros(6)
    _core.Fluctuation(parameters).observe_(*found, **RATES)
    observed_by_torch(parameters, wanted)
    assert same(found, wanted)


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="values is empty"):
        _core.Fluctuation([])
    with pytest.raises(TypeError, match=r"values\[1\]"):
        _core.Fluctuation([torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int64)])
    with pytest.raises(ValueError, match="mean"):
        _core.Fluctuation(leaves((2, 1), torch.float32)).observe_(*zeros(2), **RATES)
    for name in RATES:
        with pytest.raises(ValueError, match=f"{name} is 0"):
            _core.Fluctuation(leaves((2, 1), torch.float32)).observe_(*zeros(3), **RATES | {name: 0.0})
