"""The importance of a module, sum |dW * G| taken block by block (src/gauges/sensitivity.rs), against the same
sum over both matrices as a whole, in float64.
"""

import pytest
import torch
from increlora_rs import _core
from table_ids import describe
from torch import Tensor

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SCALE = 0.8

# tokens, in, out, active, reserve
SHAPES = [
    (1, 1, 1, 1, 0),
    (1, 13, 7, 2, 1),
    (33, 9, 65, 3, 2),
    (31, 20, 9, 0, 3),
    (64, 96, 200, 64, 3),
    (2049, 24, 40, 4, 1),
]
# Blocks have 512 rows at most, and fewer the wider dW is, down to one.
MANY_BLOCKS = [
    (5, 7, 511, 2, 0),
    (5, 7, 512, 2, 0),
    (5, 7, 513, 2, 1),
    (5, 16, 1500, 2, 1),
    (5, 3000, 700, 2, 1),
    (3, 9001, 130, 1, 1),
    (2, 1_100_000, 2, 1, 0),
]


def draw(shape, dtype=F64, parameter_dtype=None, seed=0) -> dict[str, Tensor | float]:
    tokens, features, out, active, reserve = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "gy": (tokens, out),
        "x": (tokens, features),
        "a": (active + reserve, features),
        "b": (out, active + reserve),
        "e": (active, 1),
    }
    drawn = {name: torch.randn(*size, generator=generator, dtype=F64) for name, size in sizes.items()}
    kinds = {name: dtype if name in ("gy", "x") else parameter_dtype or dtype for name in sizes}
    return {name: value.to(kinds[name]) for name, value in drawn.items()} | {"scale": SCALE}


def reference(gy, x, a, b, e, scale) -> float:
    gy, x, a, b, e = (tensor.to(F64) for tensor in (gy, x, a, b, e))
    reserve = torch.full((a.shape[0] - e.shape[0], 1), 1e-5, dtype=F64)
    dw = scale * b @ torch.diag(torch.cat([e, reserve])[:, 0]) @ a
    return float((dw * (gy.T @ x)).abs().sum())


def by_backward(drawn, vector: Tensor, slot: int) -> None:
    t = drawn["x"] @ drawn["a"].T
    _core.adapter_backward(**drawn, t=t, needs_x=False, importance=vector, slot=slot)


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (F32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_importance_is_the_sum_over_the_whole(shape, dtype, tolerance):
    drawn = draw(shape, dtype)
    assert float(_core.importance(**drawn)) == pytest.approx(reference(**drawn), rel=tolerance)


@pytest.mark.parametrize("shape", MANY_BLOCKS)
def test_blocks_do_not_change_the_importance(shape):
    drawn = draw(shape)
    assert float(_core.importance(**drawn)) == pytest.approx(reference(**drawn), rel=1e-10)


@pytest.mark.parametrize("shape", MANY_BLOCKS[:5])
def test_blocks_do_not_change_it_in_float32(shape):
    drawn = draw(shape, F32)
    assert float(_core.importance(**drawn)) == pytest.approx(reference(**drawn), rel=1e-5)


@pytest.mark.parametrize("shape", MANY_BLOCKS[2:6])
def test_blocks_do_not_change_it_in_the_backward_pass(shape):
    drawn, vector = draw(shape), torch.zeros(1, dtype=F64)
    by_backward(drawn, vector, 0)
    assert float(vector) == pytest.approx(reference(**drawn), rel=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(BF16, 1e-2), (FP16, 2e-3)], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("parameter_dtype", [None, F32], ids=["same_parameters", "float32_parameters"])
@pytest.mark.parametrize("shape", [*SHAPES[1:3], SHAPES[4], MANY_BLOCKS[2]])
def test_half_precision_agrees_as_far_as_it_reaches(shape, parameter_dtype, dtype, tolerance):
    drawn = draw(shape, dtype, parameter_dtype)
    assert float(_core.importance(**drawn)) == pytest.approx(reference(**drawn), rel=tolerance)


def test_half_precision_sums_in_float64():
    ones = torch.ones(1, 300, dtype=BF16)
    found = _core.importance(ones, ones, ones, ones.T, torch.ones(1, 1, dtype=BF16), 1.0)
    assert (found.dtype, float(found)) == (F64, 90_000.0)


def test_gradients_that_overflow_are_not_hidden():
    x = torch.full((2, 4), 300.0, dtype=FP16)
    found = _core.importance(x, x, x[:1] / 300, x[:1].T / 300, torch.ones(1, 1, dtype=FP16), 1.0)
    assert not bool(found.isfinite())


def test_while_dw_is_zero_nothing_matters():
    drawn = draw((5, 6, 7, 2, 0))
    drawn["b"].zero_()
    assert float(_core.importance(**drawn)) == 0.0


def test_no_tokens_matter_nothing():
    assert float(_core.importance(**draw((0, 6, 7, 2, 1)))) == 0.0


def test_strides_do_not_matter():
    drawn = draw((600, 40, 520, 2, 1))
    strided = {n: v.T.contiguous().T if isinstance(v, Tensor) else v for n, v in drawn.items()}
    assert float(_core.importance(**strided)) == pytest.approx(float(_core.importance(**drawn)), rel=1e-13)


def test_signs_do_not_cancel():
    drawn = draw((5, 6, 7, 2, 1))
    negative = drawn | {"scale": -SCALE}
    assert float(_core.importance(**negative)) == pytest.approx(float(_core.importance(**drawn)), rel=1e-14)


def test_each_backward_pass_adds_to_its_slot():
    first, second = draw((5, 6, 7, 2, 1), seed=1), draw((5, 6, 7, 2, 1), seed=2)
    vector = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    by_backward(first, vector, 1)
    by_backward(second, vector, 1)
    want = 2.0 + reference(**first) + reference(**second)
    assert vector.tolist() == pytest.approx([1.0, want, 3.0], rel=1e-10)


def test_a_strided_vector_takes_it_where_it_belongs():
    storage = torch.zeros(6, dtype=F64)
    drawn = draw((5, 6, 7, 2, 1))
    by_backward(drawn, storage[::2], 2)
    assert storage.tolist() == pytest.approx([0, 0, 0, 0, reference(**drawn), 0], rel=1e-10)


def test_the_importance_is_free_of_the_graph():
    drawn = draw((5, 6, 7, 2, 1))
    drawn["a"].requires_grad_()
    assert not _core.importance(**drawn).requires_grad


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("gy", torch.zeros(3, 4), ValueError),
        ("gy", torch.zeros(15), ValueError),
        ("gy", torch.zeros(3, 5, dtype=torch.int64), TypeError),
        ("gy", torch.zeros(3, 5, device="meta"), ValueError),
        ("x", torch.zeros(3, 5), ValueError),
        ("x", torch.zeros(4), ValueError),
        ("x", torch.zeros(3, 4, dtype=torch.int64), TypeError),
        ("a", torch.zeros(4), ValueError),
        ("a", torch.zeros(3, 4, dtype=torch.int64), TypeError),
        ("b", torch.zeros(5, 2), ValueError),
        ("b", torch.zeros(5, 3, dtype=F64), TypeError),
        ("e", torch.zeros(4, 1), ValueError),
        ("e", torch.zeros(2), ValueError),
        ("e", torch.zeros(2, 1, dtype=BF16), TypeError),
        ("scale", float("nan"), ValueError),
        ("scale", float("-inf"), ValueError),
        ("scale", None, TypeError),
    ],
    ids=describe,
)
def test_bad_input_is_refused_by_name(name, value, error):
    with pytest.raises(error, match=rf"(?i)\b{name}\b"):
        _core.importance(**draw((3, 4, 5, 2, 1), F32) | {name: value})
