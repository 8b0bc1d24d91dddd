"""The forward and backward of a block-diagonal update (src/ops/block_diagonal.rs), by `_core` and by `ops`,
against a reference that builds dW whole and leaves the gradients to autograd, in float64.
"""

import numpy as np
import pytest
import torch
from increlora_rs import _core
from increlora_rs.ops.block_diagonal import BlockDiagonal
from increlora_rs.ops.update import Call
from torch import nn

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SCALE = 1.7
# slices, rows, in, out
SHAPES = [(1, 2, 9, 7), (2, 1, 6, 4), (3, 4, 12, 30), (4, 2, 64, 32), (8, 3, 8, 16), (2, 40, 96, 64)]
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(*size, seed=0, dtype=F64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def parts(shape, leading=(5,), dtype=F64, parameter_dtype=None):
    """A, B, x, y, gy."""
    slices, rows, features, out = shape
    of_parameters = parameter_dtype or dtype
    a = draw(slices, rows, features // slices, seed=1, dtype=of_parameters)
    b = draw(slices, out // slices, rows, seed=2, dtype=of_parameters)
    x, y, gy = (draw(*leading, n, seed=3 + k, dtype=dtype) for k, n in enumerate((features, out, out)))
    return a, b, x, y, gy


def dense(a, b):
    return SCALE * torch.block_diag(*(left @ right for right, left in zip(a, b, strict=True)))


def reference(a, b, x, y, gy, kept=None):
    """Output and gradients of y, x, A, B; ``kept`` is what x is multiplied by."""
    leaves = [t.detach().to(F64).requires_grad_() for t in (y, x, a, b)]
    y, x, a, b = leaves
    result = y + (x if kept is None else x * kept) @ dense(a, b).T
    return result.detach(), *torch.autograd.grad(result, leaves, gy.to(F64))


def by_ops(a, b, x, y, gy, torchs=False):
    leaves = [t.detach().clone().requires_grad_() for t in (y, x, a, b)]
    y, x, a, b = leaves
    update = BlockDiagonal(a, b, SCALE)
    result = (update._add_by_torch if torchs else update.add)(y, x, Call())
    return result.detach(), *torch.autograd.grad(result, leaves, gy)


def assert_all_close(found, wanted, tolerance):
    for name, got, want in zip(("out", "grad y", "grad x", "grad A", "grad B"), found, wanted, strict=True):
        assert got.shape == want.shape, name
        error = torch.linalg.norm(got.to(F64) - want)
        assert error <= tolerance * (torch.linalg.norm(want) + 1e-9), f"{name}: {float(error)} off"


@pytest.mark.parametrize("torchs", [False, True], ids=["rust", "torch"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-11), (F32, 1e-5)], ids=str)
@SHAPED
def test_output_and_gradients_are_those_of_the_dense_update(shape, dtype, tolerance, torchs):
    given = parts(shape, dtype=dtype)
    assert_all_close(by_ops(*given, torchs=torchs), reference(*given), tolerance)


@SHAPED
def test_gradients_are_those_of_finite_differences(shape):
    a, b, x, y, _ = parts(shape, leading=(2,))
    leaves = [t.requires_grad_() for t in (y, x, a, b)]
    assert torch.autograd.gradcheck(lambda y, x, a, b: BlockDiagonal(a, b, SCALE).add(y, x, Call()), leaves)


@pytest.mark.parametrize("parameter_dtype", [F32, BF16], ids=["float32_parameters", "same_parameters"])
@pytest.mark.parametrize("shape", SHAPES[2:4], ids=str)
def test_bfloat16_agrees_as_far_as_it_reaches(shape, parameter_dtype):
    given = parts(shape, (17,), BF16, parameter_dtype)
    found = by_ops(*given)
    assert [t.dtype for t in found] == [BF16, BF16, BF16, parameter_dtype, parameter_dtype]
    assert_all_close(found, reference(*given), 3e-2)


@SHAPED
def test_a_whole_layer_is_the_base_and_the_update(shape):
    a, b, x, y, gy = parts(shape)
    weight, bias = draw(y.shape[-1], x.shape[-1], seed=7), draw(y.shape[-1], seed=8)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    found = BlockDiagonal(a, b, SCALE).with_base(x, weight, bias, Call())
    wanted = nn.functional.linear(x, weight + dense(a, b), bias)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(result, leaves, gy) for result in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 3, 4), (0,), (2, 0)], ids=str)
def test_any_leading_dimensions_do(leading):
    given = parts((3, 4, 12, 30), leading)
    assert_all_close(by_ops(*given), reference(*given), 1e-11)


def test_strides_do_not_matter():
    given = parts((3, 4, 12, 30), (6,))
    a, b, *rest = given
    strided = [a.mT.contiguous().mT, b.mT.contiguous().mT, *(t.T.contiguous().T for t in rest)]
    assert_all_close(by_ops(*strided), reference(*given), 1e-11)


def test_a_call_may_let_y_be_overwritten():
    a, b, x, y, _ = parts((2, 1, 6, 4))
    assert BlockDiagonal(a, b, SCALE).add(y, x, Call(inplace=True)).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_dropout_drops_the_same_elements_in_both_passes(dtype):
    p, seed = 0.3, 5
    a, b, x, y, gy = parts((3, 4, 12, 30), dtype=dtype)
    bits = np.unpackbits(_core.dropout_mask(x.numel(), p, seed).numpy(), bitorder="little")[: x.numel()]
    keep = round((1 - p) * 65536) / 65536
    kept = torch.from_numpy(bits).reshape(x.shape).to(F64) / keep
    wanted = reference(a, b, x, y, gy, kept)
    _, t, mask = _core.block_diagonal_forward(x, a, b, SCALE, y=y, p=p, seed=seed)
    assert mask is None
    gradients = _core.block_diagonal_backward(gy, x, t, a, b, SCALE, p=p, seed=seed)
    assert_all_close((y, gy, *gradients), wanted, {F64: 1e-11, F32: 1e-5, BF16: 3e-2}[dtype])


def test_a_dropout_mask_of_the_cuda_kernels_does_the_same(emulated):
    p, seed = 0.3, 5
    found = []
    for launches in (True, False):
        if not launches:
            _core.cuda_emulate(0)
        a, b, x, y, gy = parts((3, 4, 12, 30), dtype=F32)
        _, t, mask = _core.block_diagonal_forward(x, a, b, SCALE, y=y, p=p, seed=seed)
        assert (mask is not None) is launches
        gradients = _core.block_diagonal_backward(gy, x, t, a, b, SCALE, mask=mask, p=p, seed=seed)
        found.append((y, *gradients))
    torch.testing.assert_close(*found)


@SHAPED
def test_the_lora_of_it_is_the_update(shape):
    a, b, *_ = parts(shape)
    left, right = BlockDiagonal(a, b, SCALE).lora()[::-1]
    assert right.shape[0] == left.shape[1] == shape[0] * shape[1]
    torch.testing.assert_close(left @ right, dense(a, b), rtol=1e-12, atol=1e-12)


BAD = [
    ({"a": torch.zeros(2, 3, dtype=F64)}, ValueError, "A has shape .*a stack of matrices"),
    ({"b": torch.zeros(2, 3, dtype=F64)}, ValueError, "B has shape .*a stack of matrices"),
    ({"b": torch.zeros(2, 2, 2, dtype=F64)}, ValueError, "B has shape"),
    ({"a": torch.zeros(2, 1, 3, dtype=torch.int64)}, TypeError, "A has dtype"),
    ({"x": torch.zeros(5, 7, dtype=F64)}, ValueError, "x has shape"),
    ({"y": torch.zeros(5, 7, dtype=F64)}, ValueError, "y has shape"),
    ({"y": None}, ValueError, "give y or weight"),
    ({"scale": float("inf")}, ValueError, "scale is inf"),
    ({"p": -0.1}, ValueError, "p is -0.1"),
]


@pytest.mark.parametrize(("changed", "error", "told"), BAD, ids=[told for _, _, told in BAD])
def test_bad_arguments_are_refused_by_name(changed, error, told):
    arguments = {
        "x": torch.zeros(5, 6, dtype=F64),
        "a": torch.zeros(2, 1, 3, dtype=F64),
        "b": torch.zeros(2, 2, 1, dtype=F64),
        "scale": 1.0,
        "y": torch.zeros(5, 4, dtype=F64),
    }
    with pytest.raises(error, match=told):
        _core.block_diagonal_forward(**(arguments | changed))
