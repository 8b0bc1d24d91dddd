"""The orthogonality regulariser and its gradient in closed form (src/policies/orthogonality.rs) against
autograd of the formula.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from increlora_rs import _core
from table_ids import describe
from torch import Tensor

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# rows, in, out of each module
MODELS = [
    [(1, 1, 1)],
    [(1, 12, 8)],
    [(4, 12, 8)],
    [(9, 5, 3)],
    [(1, 7, 9), (3, 7, 9), (2, 31, 5), (64, 80, 100)],
]
TOLERANCES = [(F64, 1e-10), (F32, 1e-5), (BF16, 1e-2), (FP16, 2e-3)]


def draw(sizes, dtype=F64, seed=0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    a = [torch.randn(rows, n, generator=generator, dtype=F64).to(dtype) for rows, n, _ in sizes]
    b = [torch.randn(out, rows, generator=generator, dtype=F64).to(dtype) for rows, _, out in sizes]
    return a, b


def reference(a, b) -> tuple[Tensor, list[Tensor]]:
    """R and its gradients for all A, then all B."""
    a, b = ([m.detach().to(F64).requires_grad_() for m in matrices] for matrices in (a, b))
    grams = [m @ m.T for m in a] + [m.T @ m for m in b]
    residuals = [gram - torch.eye(len(gram), dtype=F64) for gram in grams]
    value = torch.stack([residual.square().sum().sqrt() for residual in residuals]).mean()
    return value.detach(), list(torch.autograd.grad(value, a + b))


def added(a, b, factor=1.0, start=0.0, dtype=None) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients, the latter on top of `start`."""
    grads = [torch.full_like(m, start, dtype=dtype) for m in a + b]
    factor = factor if isinstance(factor, Tensor) else torch.tensor(factor, dtype=F64)
    value = _core.add_orthogonality_gradient_(a, b, grads[: len(a)], grads[len(a) :], factor)
    return value, grads


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = torch.linalg.norm(got.to(F64) - want)
    assert error <= tolerance * torch.linalg.norm(want)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", MODELS)
def test_the_value_is_the_mean_of_the_norms(sizes, dtype, tolerance):
    a, b = draw(sizes, dtype)
    assert float(_core.orthogonality(a, b)) == pytest.approx(float(reference(a, b)[0]), rel=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", MODELS)
def test_the_gradient_is_autograds(sizes, dtype, tolerance):
    a, b = draw(sizes, dtype)
    for got, want in zip(added(a, b)[1], reference(a, b)[1], strict=True):
        assert_close(got, want, tolerance)


@pytest.mark.parametrize("sizes", MODELS)
def test_the_gradient_comes_with_the_value(sizes):
    a, b = draw(sizes)
    assert float(added(a, b)[0]) == pytest.approx(float(reference(a, b)[0]), rel=1e-10)


@pytest.mark.parametrize("factor_dtype", [F64, F32])
def test_the_gradient_is_added_times_the_factor(factor_dtype):
    a, b = draw(MODELS[-1])
    got = added(a, b, torch.tensor(0.125, dtype=factor_dtype), start=3.0)[1]
    for grad, want in zip(got, reference(a, b)[1], strict=True):
        assert_close(grad, 3.0 + 0.125 * want, 1e-10)


def test_gradients_may_be_wider_than_their_parameters():
    a, b = draw(MODELS[2], BF16)
    got = added(a, b, dtype=F32)[1]
    for grad, want in zip(got, reference(a, b)[1], strict=True):
        assert_close(grad, want, 1e-5)


def test_modules_may_differ_in_dtype():
    (a32, b32), (a64, b64) = draw(MODELS[2], F32), draw(MODELS[1], F64)
    got = added(a32 + a64, b32 + b64)[1]
    for grad, want in zip(got, reference(a32 + a64, b32 + b64)[1], strict=True):
        assert_close(grad, want, 1e-5)


def test_strided_gradients_are_added_to():
    a, b = draw([(4, 12, 8)])
    grad_a, grad_b = torch.zeros(12, 4, dtype=F64).T, torch.zeros(4, 8, dtype=F64).T
    _core.add_orthogonality_gradient_(a, b, [grad_a], [grad_b], torch.tensor(1.0))
    for grad, want in zip((grad_a, grad_b), reference(a, b)[1], strict=True):
        assert_close(grad, want, 1e-10)


def test_strided_parameters_do():
    a, b = draw([(4, 12, 8)])
    got = added([a[0].T.contiguous().T], [b[0].T.contiguous().T])[1]
    for grad, want in zip(got, reference(a, b)[1], strict=True):
        assert_close(grad, want, 1e-10)


ORTHONORMAL = [torch.eye(1, 5), torch.eye(3, 5), torch.eye(6, 9).flip(1), -torch.eye(4)]


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("a", ORTHONORMAL)
def test_orthonormal_matrices_have_no_gradient(a, dtype):
    grads = added([a.to(dtype)], [a.T.to(dtype)], 0.1, start=2.0)[1]
    assert all(torch.equal(grad, torch.full_like(grad, 2.0)) for grad in grads)


@pytest.mark.parametrize("a", ORTHONORMAL)
def test_orthonormal_matrices_have_the_value_zero(a):
    assert float(_core.orthogonality([a], [a.T])) == 0.0


def test_an_orthonormal_matrix_leaves_the_others_theirs():
    (a, b), eye = draw([(3, 5, 6)]), torch.eye(3, 5, dtype=F64)
    grads = added([eye, *a], [eye.T, *b])[1]
    want = reference(a, b)[1]
    assert_close(grads[1], want[0] / 2, 1e-10)
    assert_close(grads[3], want[1] / 2, 1e-10)


def test_matrices_of_zeros_have_no_gradient():
    grads = added([torch.zeros(2, 5, dtype=F64)], [torch.zeros(4, 2, dtype=F64)])[1]
    assert not any(grad.any() for grad in grads)


def test_nearly_orthonormal_matrices_have_a_gradient_of_their_own_size():
    a = [torch.eye(2, 5, dtype=F64) * (1 + 1e-9)]
    grads = added(a, [a[0].T.contiguous()])[1]
    for grad, want in zip(grads, reference(a, [a[0].T])[1], strict=True):
        assert_close(grad, want, 1e-6)


def test_a_module_without_components_counts_as_orthonormal():
    assert float(_core.orthogonality([torch.zeros(0, 5)], [torch.zeros(4, 0)])) == 0.0


def test_the_value_is_a_float64_scalar_without_graph():
    a, b = draw([(3, 5, 6)], F32)
    value = _core.orthogonality([a[0].requires_grad_()], b)
    assert (value.dtype, value.shape, value.requires_grad) == (F64, (), False)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5),
    st.integers(0, 10**6),
    st.floats(-2.0, 2.0),
)
def test_every_model_follows_the_formula(sizes, seed, factor):
    a, b = draw(sizes, seed=seed)
    for got, want in zip(added(a, b, factor)[1], reference(a, b)[1], strict=True):
        assert_close(got, factor * want, 1e-9)


def good(dtype=F32) -> dict:
    a, b = draw([(2, 5, 6), (2, 5, 6)], dtype)
    grads = {"grad_a": [torch.zeros_like(m) for m in a], "grad_b": [torch.zeros_like(m) for m in b]}
    return {"a": a, "b": b, **grads, "factor": torch.tensor(1.0)}


BAD_MATRICES = [
    ("a", [], ValueError),
    ("b", [], ValueError),
    ("a", [torch.zeros(5)] * 2, ValueError),
    ("b", [torch.zeros(1, 2, 3)] * 2, ValueError),
    ("a", [torch.ones(2, 5, dtype=torch.int64)] * 2, TypeError),
    ("b", [torch.ones(6, 2, dtype=torch.complex64)] * 2, TypeError),
    ("a", torch.ones(2, 5), TypeError),
    ("b", [None, None], TypeError),
]
BAD_GRADIENTS = [
    ("grad_a", [], ValueError),
    ("grad_b", [torch.zeros(6, 2)] * 3, ValueError),
    ("grad_a", [torch.zeros(5, 2)] * 2, ValueError),
    ("grad_b", [torch.zeros(2)] * 2, ValueError),
    ("grad_a", [torch.zeros(2, 5, dtype=torch.int64)] * 2, TypeError),
    ("grad_b", [torch.zeros(6, 2, dtype=torch.bool)] * 2, TypeError),
    ("grad_a", [torch.zeros(2, 5, device="meta")] * 2, ValueError),
    ("grad_a", [None, None], TypeError),
    ("factor", torch.ones(2), ValueError),
    ("factor", torch.ones(3, 1), ValueError),
    ("factor", torch.ones(0), ValueError),
    ("factor", torch.tensor(1j), TypeError),
    ("factor", 1.0, TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD_MATRICES, ids=describe)
def test_the_value_refuses_by_name(name, value, error):
    arguments = {key: good()[key] for key in ("a", "b")} | {name: value}
    with pytest.raises(error, match=rf"\b{name}\b"):
        _core.orthogonality(**arguments)


@pytest.mark.parametrize(("name", "value", "error"), BAD_GRADIENTS, ids=describe)
def test_the_gradient_refuses_by_name(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        _core.add_orthogonality_gradient_(**good() | {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("b", torch.zeros(5)), ("b", torch.zeros(6, 2, dtype=torch.int64))],
    ids=["1-D", "int"],
)
def test_a_refused_call_changes_no_gradient(name, value):
    arguments = good()
    arguments[name] = [arguments[name][0], value]
    arguments["grad_b"][1] = torch.zeros_like(value)
    with pytest.raises((ValueError, TypeError)):
        _core.add_orthogonality_gradient_(**arguments)
    assert not any(grad.any() for grad in (*arguments["grad_a"], *arguments["grad_b"]))
