"""The forward and backward of an update by a square matrix (src/ops/square.rs), by `_core` and by `ops`,
against a reference that builds dW whole and leaves the gradients to autograd, in float64.
"""

import numpy as np
import pytest
import torch
from increlora_rs import _core
from increlora_rs.ops.square import Square, _angles
from increlora_rs.ops.update import Call
from largest import Largest
from squares import TYPES, dense, side_of
from torch import nn

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SCALE = 1.7
# in, out, rank: q divides both, neither, is larger than in, than out, than both.
SIZES = [(12, 12, 6), (12, 24, 1), (7, 5, 1), (30, 12, 2), (12, 30, 2), (16, 96, 8), (96, 16, 8), (9, 9, 8)]
CASES = [(form, *size) for form in TYPES for size in SIZES]
FORMS = pytest.mark.parametrize("form", TYPES)


def draw(*size, seed=0, dtype=F64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def parts(form, features, out, rank, leading=(5,), dtype=F64, parameter_dtype=None):
    """M, x, y, gy."""
    side = side_of(rank, out, features, form)
    m = draw(side, side, seed=1, dtype=parameter_dtype or dtype) / side**0.5
    return (
        m,
        *(draw(*leading, size, seed=size, dtype=dtype) for size in (features, out)),
        draw(*leading, out, seed=4, dtype=dtype),
    )


def reference(form, m, x, y, gy, kept=None, fold=True):
    """Output and gradients of y, x, M, of dW as a whole; ``kept`` is what x is multiplied by."""
    leaves = [t.detach().to(F64).requires_grad_() for t in (y, x, m)]
    y, x, m = leaves
    delta = SCALE * dense(form, m, y.shape[-1], x.shape[-1], fold)
    result = y + (x if kept is None else x * kept) @ delta.T
    return result.detach(), *torch.autograd.grad(result, leaves, gy.to(F64))


def by_ops(form, m, x, y, gy, fold=True, call=None, torchs=False):
    leaves = [t.detach().clone().requires_grad_() for t in (y, x, m)]
    y, x, m = leaves
    square = Square(m, form, y.shape[-1], x.shape[-1], SCALE, fold)
    result = (square._add_by_torch if torchs else square.add)(y, x, call or Call())
    return result.detach(), *torch.autograd.grad(result, leaves, gy)


def assert_all_close(found, wanted, tolerance):
    for name, got, want in zip(("out", "grad y", "grad x", "grad M"), found, wanted, strict=True):
        assert got.shape == want.shape, name
        error = torch.linalg.norm(got.to(F64) - want)
        assert error <= tolerance * (torch.linalg.norm(want) + 1e-9), f"{name}: {float(error)} off"


@pytest.mark.parametrize("torchs", [False, True], ids=["rust", "torch"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-11), (F32, 1e-5)], ids=str)
@pytest.mark.parametrize(("form", "features", "out", "rank"), CASES)
def test_output_and_gradients_are_those_of_the_dense_update(
    form, features, out, rank, dtype, tolerance, torchs
):
    given = parts(form, features, out, rank, dtype=dtype)
    assert_all_close(by_ops(form, *given, torchs=torchs), reference(form, *given), tolerance)


@pytest.mark.parametrize("torchs", [False, True], ids=["rust", "torch"])
@pytest.mark.parametrize(("features", "out", "rank"), SIZES)
def test_without_folding_inputs_of_type_6_are_ignored_as_published(features, out, rank, torchs):
    given = parts(6, features, out, rank)
    found = by_ops(6, *given, fold=False, torchs=torchs)
    assert_all_close(found, reference(6, *given, fold=False), 1e-11)


@pytest.mark.parametrize(("form", "features", "out", "rank"), CASES)
def test_gradients_are_those_of_finite_differences(form, features, out, rank):
    m, x, y, _ = parts(form, features, out, rank, leading=(2,))
    leaves = [t.requires_grad_() for t in (y, x, m)]

    def added(y, x, m):
        return Square(m, form, out, features, SCALE).add(y, x, Call())

    assert torch.autograd.gradcheck(added, leaves)


@FORMS
@pytest.mark.parametrize("parameter_dtype", [F32, BF16], ids=["float32_parameters", "same_parameters"])
@pytest.mark.parametrize(("features", "out", "rank"), [(64, 48, 2), (48, 160, 4), (160, 48, 4)])
def test_bfloat16_agrees_as_far_as_it_reaches(form, features, out, rank, parameter_dtype):
    given = parts(form, features, out, rank, (17,), BF16, parameter_dtype)
    found = by_ops(form, *given)
    assert [t.dtype for t in found] == [BF16, BF16, BF16, parameter_dtype]
    assert_all_close(found, reference(form, *given), 3e-2)


@FORMS
def test_a_whole_layer_is_the_base_and_the_update(form):
    m, x, _, gy = parts(form, 30, 12, 2)
    weight, bias = draw(12, 30, seed=7), draw(12, seed=8)
    leaves = [t.requires_grad_() for t in (x, m)]
    square = Square(m, form, 12, 30, SCALE)
    found = square.with_base(x, weight, bias, Call())
    wanted = nn.functional.linear(x, weight + SCALE * dense(form, m, 12, 30), bias)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(result, leaves, gy) for result in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


@FORMS
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 3, 4), (0,), (2, 0)], ids=str)
def test_any_leading_dimensions_do(form, leading):
    given = parts(form, 7, 5, 2, leading)
    assert_all_close(by_ops(form, *given), reference(form, *given), 1e-11)


@FORMS
def test_strides_do_not_matter(form):
    m, x, y, gy = parts(form, 9, 12, 2, (6,))
    strided = [t.T.contiguous().T for t in (m, x, y, gy)]
    assert_all_close(by_ops(form, *strided), reference(form, m, x, y, gy), 1e-11)


@FORMS
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_dropout_drops_the_same_elements_in_both_passes(form, dtype):
    p, seed = 0.3, 5
    m, x, _, gy = parts(form, 30, 12, 2, dtype=dtype)
    bits = np.unpackbits(_core.dropout_mask(x.numel(), p, seed).numpy(), bitorder="little")[: x.numel()]
    keep = round((1 - p) * 65536) / 65536
    kept = torch.from_numpy(bits).reshape(x.shape).to(F64) / keep
    y = torch.zeros(5, 12, dtype=dtype)
    angles = _angles(len(m), -(-30 // len(m)), dtype, m.device) if form == 6 else None
    _, sums, mask = _core.square_forward(x, m, form, SCALE, out=12, angles=angles, y=y, p=p, seed=seed)
    assert mask is None
    assert (sums is None) is (form == 6)
    gx, gm = _core.square_backward(
        gy, x if form == 6 else None, sums, m, form, SCALE, features=30, angles=angles, p=p, seed=seed
    )
    wanted = reference(form, m, x, torch.zeros_like(y), gy, kept)
    assert_all_close((y, gy, gx, gm), wanted, {F64: 1e-11, F32: 1e-5, BF16: 4e-2}[dtype])


@FORMS
def test_a_dropout_mask_of_the_cuda_kernels_does_the_same(form, emulated):
    p, seed = 0.3, 5
    m, x, _, gy = parts(form, 30, 12, 2, dtype=F32)
    angles = _angles(len(m), -(-30 // len(m)), F32, m.device) if form == 6 else None
    found = []
    for launches in (True, False):
        if not launches:
            _core.cuda_emulate(0)
        y = torch.zeros(5, 12)
        _, sums, mask = _core.square_forward(x, m, form, SCALE, out=12, angles=angles, y=y, p=p, seed=seed)
        assert (mask is not None) is launches
        gradients = _core.square_backward(
            gy,
            x if form == 6 else None,
            sums,
            m,
            form,
            SCALE,
            features=30,
            angles=angles,
            mask=mask,
            p=p,
            seed=seed,
        )
        found.append((y, *gradients))
    torch.testing.assert_close(*found)


@FORMS
def test_only_the_gradients_that_are_wanted_are_computed(form):
    m, x, y, gy = parts(form, 9, 12, 2)
    frozen = Square(m, form, 12, 9, SCALE).add(y, x.requires_grad_(), Call())
    frozen.backward(gy)
    assert x.grad is not None
    assert m.grad is None
    first = Square(m.requires_grad_(), form, 12, 9, SCALE).add(y, x.detach(), Call())
    first.backward(gy)
    assert m.grad is not None


@FORMS
def test_types_1_to_4_keep_a_sum_of_x_and_type_6_x(form):
    m, x, y, _ = parts(form, 30, 12, 2)
    saved = []

    def note(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        Square(m.requires_grad_(), form, 12, 30, SCALE).add(y, x, Call())
    assert (x.data_ptr() in saved) is (form == 6)


def test_a_lora_of_types_1_to_4_is_the_update_and_type_6_has_none():
    for form, features, out, rank in CASES:
        m = parts(form, features, out, rank)[0]
        lora = Square(m, form, out, features, SCALE).lora()
        if form == 6:
            assert lora is None
            continue
        a, b = lora
        assert (a.shape, b.shape) == ((len(m), features), (out, len(m)))
        torch.testing.assert_close(b @ a, SCALE * dense(form, m, out, features), rtol=1e-11, atol=1e-11)


@FORMS
@pytest.mark.parametrize("made", [Square.dense, Square.lora])
def test_nothing_larger_than_the_update_is_made_for_a_merge_or_an_export(form, made):
    features, out, rank = 400, 20, 2
    m = parts(form, features, out, rank)[0]
    with Largest() as largest:
        made(Square(m, form, out, features, SCALE))
    # Padded, for a round that is not whole.
    assert largest.numbers <= (out + len(m)) * (features + len(m)) < features**2 / 4


BAD = [
    ({"form": 5}, ValueError, "form is 5; it must be 1, 2, 3 or 4, or 6"),
    ({"form": 6, "angles": None}, ValueError, "form is 6; it must be 1, 2, 3 or 4, or 6 with the tables"),
    ({"m": torch.zeros(4, 3, dtype=F64)}, ValueError, "M has shape"),
    ({"m": torch.zeros(4, dtype=F64)}, ValueError, "M has shape"),
    ({"m": torch.zeros(4, 4, dtype=torch.int64)}, TypeError, "M has dtype"),
    ({"scale": float("nan")}, ValueError, "scale is NaN"),
    ({"p": 1.5}, ValueError, "p is 1.5"),
    ({"y": torch.zeros(5, 7, dtype=F64)}, ValueError, "y has shape"),
    ({"y": None}, ValueError, "give y or weight"),
    ({"weight": torch.zeros(12, 9, dtype=F64)}, ValueError, "give y or weight"),
]


@pytest.mark.parametrize(("changed", "error", "told"), BAD, ids=[told for _, _, told in BAD])
def test_bad_arguments_are_refused_by_name(changed, error, told):
    arguments = {
        "x": torch.zeros(5, 9, dtype=F64),
        "m": torch.zeros(4, 4, dtype=F64),
        "form": 1,
        "scale": 1.0,
        "out": 12,
        "y": torch.zeros(5, 12, dtype=F64),
    }
    with pytest.raises(error, match=told):
        _core.square_forward(**(arguments | changed))


def test_tables_of_another_size_are_refused_by_name():
    m, x, y = torch.zeros(4, 4), torch.zeros(5, 9), torch.zeros(5, 12)
    with pytest.raises(ValueError, match=r"cos has shape \[2, 2\]; it must be \[3, 2\]"):
        _core.square_forward(x, m, 6, 1.0, out=12, y=y, angles=_angles(4, 2, F32, m.device))
    with pytest.raises(ValueError, match="M has 3 rows; type 6 turns pairs"):
        _core.square_forward(x, m[:3, :3], 6, 1.0, out=12, y=y, angles=_angles(4, 3, F32, m.device))
