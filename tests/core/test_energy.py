"""What goes into a module (src/gauges/energy.rs, src/kernels/energy.rs): sums of squares over tokens that a
gradient reaches, against the sums written out in float64."""

import math

import pytest
import torch
from increlora_rs import _core

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [F64, F32, BF16, FP16]


def draw(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def energy(gy, x):
    total = torch.zeros(x.shape[1] + 1, dtype=F64)
    _core.add_energy_(total, gy, x)
    return total


def literal(gy, x):
    counted = [t for t in range(len(x)) if any(value != 0 for value in gy[t].tolist())]
    sums = [math.fsum(x[t, j].double().item() ** 2 for t in counted) for j in range(x.shape[1])]
    return torch.tensor([*sums, len(counted)], dtype=F64)


def sparse(tokens, out, dtype):
    """Every third row 0, and of the others all but the last number."""
    gy = torch.zeros(tokens, out)
    gy[:, -1] = draw(tokens)
    gy[::3] = 0.0
    return gy.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_gradient", DTYPES, ids=str)
def test_sums_are_those_over_the_tokens_that_a_gradient_reaches(dtype, of_gradient):
    gy, x = sparse(37, 5, of_gradient), draw(37, 70, seed=1, dtype=dtype)
    torch.testing.assert_close(energy(gy, x), literal(gy, x), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("tokens", "features"), [(0, 3), (1, 1), (5, 8), (16, 17), (200, 129)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_size(tokens, features, dtype):
    gy, x = sparse(tokens, 3, dtype), draw(tokens, features, seed=2, dtype=dtype)
    torch.testing.assert_close(energy(gy, x), literal(gy, x), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout(dtype):
    gy, x = sparse(20, 6, dtype), draw(20, 24, seed=3, dtype=dtype)
    wanted = energy(gy, x)
    assert torch.equal(energy(gy.t().contiguous().t(), x.t().contiguous().t()), wanted)
    assert torch.equal(energy(torch.cat([gy, gy], 1)[:, :6], torch.cat([x, x], 1)[:, 24:]), wanted)


def test_many_threads_give_the_same_bits():
    gy, x = sparse(600, 4, F32), draw(600, 700, seed=4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = energy(gy, x)
        torch.set_num_threads(3)
        assert torch.equal(energy(gy, x), wanted)
    finally:
        torch.set_num_threads(before)


def test_it_is_added_to_what_is_there():
    gy, x = sparse(12, 2, F64), draw(12, 3, dtype=F64)
    total = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    _core.add_energy_(total, gy, x)
    torch.testing.assert_close(total, literal(gy, x) + torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_in_a_token_that_does_not_count_has_no_part(dtype):
    gy, x = torch.tensor([[0.0], [1.0]]).to(dtype), torch.tensor([[math.nan, math.inf], [2.0, 3.0]])
    assert energy(gy, x.to(dtype)).tolist() == [4.0, 9.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_that_is_no_number_counts(dtype):
    gy = torch.tensor([[math.nan, 0.0], [-0.0, 0.0]]).to(dtype)
    assert energy(gy, torch.tensor([[2.0], [5.0]]).to(dtype)).tolist() == [4.0, 1.0]


GOOD = {"total": torch.zeros(4, dtype=F64), "gy": torch.zeros(5, 2), "x": torch.zeros(5, 3)}
BAD = [
    ({"total": torch.zeros(4)}, TypeError, "total has dtype Float"),
    ({"total": torch.zeros(3, dtype=F64)}, ValueError, "total has 3 numbers.*3 columns.*must have 4"),
    ({"total": torch.zeros(2, 2, dtype=F64)}, ValueError, "total has shape"),
    ({"gy": torch.zeros(4, 2)}, ValueError, r"gy has shape \[4, 2\]"),
    ({"gy": torch.zeros(5)}, ValueError, "gy has shape"),
    ({"gy": torch.zeros(5, 2, dtype=torch.int32)}, TypeError, "gy has dtype Int"),
    ({"x": torch.zeros(5)}, ValueError, "x has shape"),
    ({"x": torch.zeros(5, 3, dtype=torch.int64)}, TypeError, "x has dtype Int64"),
    ({"x": torch.zeros(5, 3, device="meta")}, ValueError, "x is on"),
]


@pytest.mark.parametrize(("bad", "error", "told"), BAD, ids=[told for _, _, told in BAD])
def test_a_bad_argument_is_refused_by_name(bad, error, told):
    with pytest.raises(error, match=told):
        _core.add_energy_(**{**GOOD, **bad})
