"""The smoothing and the regulariser of a step in one call (`StepPlan` of src/policies/step.rs) against the
two called by themselves.
"""

import math

import pytest
import torch
from increlora_rs import _core
from table_ids import describe
from torch import nn

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# rows, in, out of each module
SIZES = [(1, 12, 8), (3, 7, 9), (8, 31, 16), (9, 16, 20), (33, 40, 50)]
TOLERANCES = [(F64, 1e-10), (F32, 1e-5), (BF16, 1e-2), (FP16, 2e-3)]


def leaves(dtype=F32, sizes=SIZES):
    """A and B of each module, with gradients."""
    generator = torch.Generator().manual_seed(5)

    def leaf(*size):
        parameter = nn.Parameter(torch.randn(size, generator=generator).to(dtype))
        parameter.grad = torch.randn(size, generator=generator).to(dtype)
        return parameter

    return [leaf(rows, n) for rows, n, _ in sizes], [leaf(out, rows) for rows, _, out in sizes]


def vectors(count):
    values = torch.rand(4, count, generator=torch.Generator().manual_seed(6), dtype=F64) + 0.5
    return dict(zip(("importance", "norm", "mean", "uncertainty"), values, strict=True))


def arguments(a, b):
    return {"a": a, "b": b, "beta1": 0.85, "beta2": 0.7} | vectors(len(a))


def plan_of(a, b, **changed):
    return _core.StepPlan(**arguments(a, b) | changed)


def regularised(a, b, weight):
    """The gradients of all A, then all B, with the regulariser's of those modules that have any."""
    grads = [None if p.grad is None else p.grad.to(F64) for p in (*a, *b)]
    new = [torch.zeros_like(p, dtype=F64, requires_grad=False) for p in (*a, *b)]
    wide = [p.detach().to(F64) for p in (*a, *b)]
    count = len(a)
    factor = torch.tensor(weight, dtype=F64)
    _core.add_orthogonality_gradient_(wide[:count], wide[count:], new[:count], new[count:], factor)
    used = [k for k in range(count) if grads[k] is not None and grads[count + k] is not None]
    return [grad if grad is None or k % count not in used else grad + new[k] for k, grad in enumerate(grads)]


def assert_gradients(a, b, want, tolerance):
    for parameter, grad in zip((*a, *b), want, strict=True):
        if grad is None:
            assert parameter.grad is None
        else:
            error = torch.linalg.norm(parameter.grad.to(F64) - grad)
            assert error <= tolerance * torch.linalg.norm(grad)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
def test_the_regulariser_is_added_to_the_leaves_gradients(dtype, tolerance):
    a, b = leaves(dtype)
    want = regularised(a, b, 0.3)
    plan_of(a, b).take_gradients_(smooth=False, weight=0.3)
    assert_gradients(a, b, want, tolerance)


def test_modules_of_several_dtypes_are_done_in_one_call():
    a, b = [], []
    for dtype in (F64, BF16, F32):
        for mine, more in zip((a, b), leaves(dtype), strict=True):
            mine += more
    want = regularised(a, b, 0.3)
    plan_of(a, b).take_gradients_(smooth=False, weight=0.3)
    assert_gradients(a, b, want, 1e-2)


def test_a_module_without_gradients_counts_in_the_mean_and_stays_as_it_is():
    a, b = leaves()
    a[1].grad = b[1].grad = a[3].grad = b[4].grad = None
    want = regularised(a, b, 0.3)
    plan_of(a, b).take_gradients_(smooth=False, weight=0.3)
    assert_gradients(a, b, want, 1e-5)


def test_no_gradients_at_all_are_no_error():
    a, b = leaves()
    for parameter in (*a, *b):
        parameter.grad = None
    plan_of(a, b).take_gradients_(smooth=False, weight=0.3)
    assert all(parameter.grad is None for parameter in (*a, *b))


def test_strided_gradients_and_parameters_do():
    a, b = leaves()
    for parameter in (a[1], b[2]):
        parameter.grad = parameter.grad.T.contiguous().T
    for parameters in (a, b):
        grad = parameters[3].grad
        parameters[3] = nn.Parameter(parameters[3].detach().T.contiguous().T)
        parameters[3].grad = grad
    want = regularised(a, b, 0.3)
    plan_of(a, b).take_gradients_(smooth=False, weight=0.3)
    assert_gradients(a, b, want, 1e-5)


def test_gradients_that_share_their_memory_take_both_modules():
    a, b = leaves(F64, [(3, 7, 9)] * 2)
    a[1].grad = a[0].grad
    before = a[0].grad.clone()
    first, second = (after - before for after in regularised(a, b, 0.3)[:2])
    plan_of(a, b).take_gradients_(smooth=False, weight=0.3)
    torch.testing.assert_close(a[0].grad, before + first + second)


def test_gradients_that_are_views_of_one_buffer_do():
    a, b = leaves()
    want = regularised(a, b, 0.3)
    buffer = torch.cat([parameter.grad.flatten() for parameter in (*a, *b)])
    first = 0
    for parameter in (*a, *b):
        parameter.grad = buffer[first : first + parameter.numel()].view_as(parameter)
        first += parameter.numel()
    plan_of(a, b).take_gradients_(smooth=False, weight=0.3)
    assert_gradients(a, b, want, 1e-5)


@pytest.mark.parametrize("scale", [torch.tensor(64.0), torch.tensor([64.0]), torch.tensor(64.0, dtype=F64)])
def test_a_scale_of_the_gradients_multiplies_the_regulariser(scale):
    a, b = leaves()
    want = regularised(a, b, 0.3 * 64)
    plan_of(a, b).take_gradients_(smooth=False, weight=0.3, grad_scale=scale)
    assert_gradients(a, b, want, 1e-5)


def test_parameters_may_change_their_size_in_place():
    a, b = leaves(sizes=[(2, 6, 5)])
    plan = plan_of(a, b)
    bigger, generator = [(4, 6), (5, 4)], torch.Generator().manual_seed(1)
    for parameter, size in zip((*a, *b), bigger, strict=True):
        with torch.no_grad():
            parameter.set_(torch.randn(size, generator=generator))
        parameter.grad = torch.randn(size, generator=generator)
    want = regularised(a, b, 0.3)
    plan.take_gradients_(smooth=False, weight=0.3)
    assert_gradients(a, b, want, 1e-5)


def test_the_value_is_the_regularisers():
    a, b = leaves()
    got = plan_of(a, b).orthogonality()
    assert float(got) == pytest.approx(float(_core.orthogonality(a, b)), rel=1e-12)
    assert (got.dtype, got.shape, got.requires_grad) == (F64, (), False)


SCALES = [
    pytest.param({}, 1.0, id="no scale"),
    pytest.param({"loss_scale": 8.0}, 8.0, id="of the loss"),
    pytest.param({"grad_scale": torch.tensor([8.0])}, 8.0, id="of the gradients"),
    pytest.param({"grad_scale": torch.tensor(8.0), "loss_scale": 3.0}, 8.0, id="both"),
    pytest.param({"found_inf": torch.zeros(1)}, 1.0, id="no overflow"),
]


@pytest.mark.parametrize(("options", "scale"), SCALES)
def test_importances_are_smoothed_and_reset(options, scale):
    values, wanted = vectors(len(SIZES)), vectors(len(SIZES))
    plan_of(*leaves(), **values).take_gradients_(smooth=True, weight=0.0, **options)
    factor = wanted.pop("norm") / scale
    _core.smooth_(factor=factor, beta1=0.85, beta2=0.7, **wanted)
    torch.testing.assert_close(values["mean"], wanted["mean"], rtol=1e-14, atol=0)
    torch.testing.assert_close(values["uncertainty"], wanted["uncertainty"], rtol=1e-13, atol=0)
    assert not values["importance"].any()


@pytest.mark.parametrize("found", [torch.tensor(1.0), torch.tensor([2.0], dtype=F64)])
def test_an_overflowed_step_is_left_out_and_reset(found):
    values, before = vectors(len(SIZES)), vectors(len(SIZES))
    plan_of(*leaves(), **values).take_gradients_(smooth=True, weight=0.0, found_inf=found)
    assert torch.equal(values["mean"], before["mean"])
    assert torch.equal(values["uncertainty"], before["uncertainty"])
    assert not values["importance"].any()


def test_what_is_not_asked_for_changes_nothing():
    a, b = leaves()
    grads, values = [p.grad.clone() for p in (*a, *b)], vectors(len(a))
    plan_of(a, b, **values).take_gradients_(smooth=False, weight=0.0)
    assert all(torch.equal(p.grad, grad) for p, grad in zip((*a, *b), grads, strict=True))
    assert all(torch.equal(values[name], value) for name, value in vectors(len(a)).items())


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("a", [], ValueError),
        ("b", [torch.zeros(6, 2)], ValueError),
        ("a", [torch.zeros(5)] * 5, ValueError),
        ("b", [torch.zeros(6, 2, dtype=torch.int64)] * 5, TypeError),
        ("a", [None] * 5, TypeError),
        ("importance", torch.zeros(5), TypeError),
        ("importance", torch.zeros(5, 1, dtype=F64), ValueError),
        ("factor", torch.zeros(4, dtype=F64), ValueError),
        ("mean", torch.zeros(6, dtype=F64), ValueError),
        ("uncertainty", torch.zeros(5, dtype=F32), TypeError),
        ("beta1", 1.0, ValueError),
        ("beta2", math.nan, ValueError),
    ],
    ids=describe,
)
def test_a_bad_plan_is_refused_by_name(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        _core.StepPlan(**arguments(*leaves()) | {"norm" if name == "factor" else name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("weight", math.nan, ValueError),
        ("weight", math.inf, ValueError),
        ("weight", None, TypeError),
        ("grad_scale", torch.ones(2), ValueError),
        ("grad_scale", torch.ones(1, dtype=torch.int64), TypeError),
        ("grad_scale", 2.0, TypeError),
        ("found_inf", torch.zeros(0), ValueError),
        ("loss_scale", "2", TypeError),
    ],
    ids=describe,
)
def test_a_bad_step_is_refused_by_name(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        plan_of(*leaves()).take_gradients_(**{"smooth": True, "weight": 0.1, name: value})


def products_of_torch(plan):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        plan.take_gradients_(smooth=False, weight=0.1)
    names = ("aten::mm", "aten::matmul", "aten::bmm", "aten::addmm_", "aten::addmm")
    return sum(event.count for event in profile.key_averages() if event.key in names)


def test_matrices_on_the_cpu_are_done_without_torchs_products():
    a, b = leaves(sizes=[(8, 256, 256)] * 50)
    strided_a, strided_b = leaves(sizes=[(8, 256, 256)] * 50)
    for parameter in (*strided_a, *strided_b):
        parameter.grad = parameter.grad.T.contiguous().T
    assert products_of_torch(plan_of(a, b)) == 0
    assert products_of_torch(plan_of(strided_a, strided_b)) > 0
