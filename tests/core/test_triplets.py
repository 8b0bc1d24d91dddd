"""The arithmetic of AdaLoRA's triplets (src/policies/triplets.rs and triplets/scores.rs): the sensitivities
against their formulas, one number after the other, the budget against the paper's code, what is masked."""

import math

import numpy as np
import pytest
import torch
from increlora_rs import _core
from increlora_rs._core import TripletSchedule, TripletScores

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
BETA1, BETA2 = 0.85, 0.7
# Rank, in and out of each module.
SIZES = [(4, 7, 5), (1, 3, 6), (3, 1, 1)]


def drawn(dtype):
    """A, B and E of every module, leaves."""
    generator = torch.Generator().manual_seed(3)
    shapes = [[(r, i), (o, r), (r, 1)] for r, i, o in SIZES]
    return [
        [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in of_one]
        for of_one in shapes
    ]


def scores_of(modules, dtype):
    count = sum(p.numel() for module in modules for p in module)
    mean, uncertainty = torch.zeros(count, dtype=dtype), torch.zeros(count, dtype=dtype)
    a, b, e = (list(of_all) for of_all in zip(*modules, strict=True))
    return TripletScores(a, b, e, mean, uncertainty, BETA1, BETA2), mean, uncertainty


def step(modules, number):
    """Other gradients, and other values, as after an optimizer's step."""
    generator = torch.Generator().manual_seed(100 + number)
    for module in modules:
        for p in module:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.data.add_(p.grad, alpha=-0.1)


def smoothed(history):
    """The mean and the uncertainty of one number, of its value and gradient at every step."""
    mean = uncertainty = 0.0
    for value, gradient in history:
        importance = abs(value * gradient)
        mean = BETA1 * mean + (1 - BETA1) * importance
        uncertainty = BETA2 * uncertainty + (1 - BETA2) * abs(importance - mean)
    return mean, uncertainty


def plain(gradient):
    return gradient


def strided(gradient):
    """The same numbers with gaps between them."""
    return torch.stack([gradient, torch.zeros_like(gradient)], -1)[..., 0]


@pytest.mark.parametrize("layout", [plain, strided], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(
    ("dtype", "wide", "tolerance"),
    [(F64, F64, 1e-13), (F32, F32, 1e-5), (F32, F64, 1e-6), (BF16, F32, 1e-5), (FP16, F32, 1e-5)],
    ids=str,
)
def test_every_number_is_smoothed_by_the_formula(dtype, wide, tolerance, layout):
    modules = drawn(dtype)
    core, mean, uncertainty = scores_of(modules, wide)
    parameters = [p for module in modules for p in module]
    histories = [[] for _ in range(mean.numel())]
    for number in range(3):
        step(modules, number)
        values = torch.cat([p.detach().double().flatten() for p in parameters])
        gradients = torch.cat([p.grad.double().flatten() for p in parameters])
        for history, *pair in zip(histories, values.tolist(), gradients.tolist(), strict=True):
            history.append(pair)
        for p in parameters:
            p.grad = layout(p.grad)
        core.observe_()
    wanted = torch.tensor([smoothed(history) for history in histories], dtype=F64)
    # The importance of numbers in bfloat16 is of their own values, whatever it is kept in.
    torch.testing.assert_close(mean.double(), wanted[:, 0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(uncertainty.double(), wanted[:, 1], rtol=tolerance, atol=tolerance)
    scores = (wanted[:, 0] * wanted[:, 1]).split([p.numel() for p in parameters])
    of_all = []
    for k, (rank, features, out) in enumerate(SIZES):
        a, b, e = scores[3 * k : 3 * k + 3]
        of_all += [
            float(e[i] + a.view(rank, features)[i].mean() + b.view(out, rank)[:, i].mean())
            for i in range(rank)
        ]
    found = core.values()
    assert (found.dtype, found.shape) == (F64, (sum(rank for rank, _, _ in SIZES),))
    torch.testing.assert_close(found, torch.tensor(of_all, dtype=F64), rtol=tolerance, atol=tolerance)


def test_two_steps_by_hand():
    parameters = [torch.full(size, 2.0, dtype=F64, requires_grad=True) for size in [(1, 1)] * 3]
    core, mean, uncertainty = scores_of([parameters], F64)
    for gradients in ([1.0, -2.0, 0.5], [3.0, 0.0, 0.5]):
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = torch.full_like(p, gradient)
        core.observe_()
    # A: I is 2, then 6. The mean 0.3, then 0.255 + 0.9; the uncertainty 0.3 * 1.7, then 0.357 + 0.3 * 4.845.
    assert mean.tolist() == pytest.approx([1.155, 0.51, 0.2775])
    assert uncertainty.tolist() == pytest.approx([1.8105, 0.867, 0.39525])
    assert core.values().item() == pytest.approx(1.155 * 1.8105 + 0.51 * 0.867 + 0.2775 * 0.39525)


@pytest.mark.parametrize("layout", [plain, strided], ids=lambda layout: layout.__name__)
def test_a_parameter_without_a_gradient_decays_and_a_number_that_is_not_finite_stays(layout):
    modules = drawn(F32)
    core, mean, uncertainty = scores_of(modules, F32)
    step(modules, 0)
    core.observe_()
    before = mean.clone(), uncertainty.clone()
    a, b, _ = modules[0]
    a.grad = None
    b.grad = layout(torch.full_like(b, math.inf))
    core.observe_()
    count = a.numel()
    torch.testing.assert_close(mean[:count], BETA1 * before[0][:count])
    torch.testing.assert_close(
        uncertainty[:count], BETA2 * before[1][:count] + (1 - BETA2) * BETA1 * before[0][:count]
    )
    of_b = slice(count, count + b.numel())
    assert torch.equal(mean[of_b], before[0][of_b]) and torch.equal(uncertainty[of_b], before[1][of_b])
    assert torch.isfinite(core.values()).all()


def test_gradients_and_parameters_are_read_alone_and_no_graph_is_made():
    modules = drawn(F32)
    core, mean, _ = scores_of(modules, F32)
    step(modules, 0)
    kept = [(p.detach().clone(), p.grad.clone()) for module in modules for p in module]
    core.observe_()
    for p, (value, gradient) in zip((p for module in modules for p in module), kept, strict=True):
        assert torch.equal(p, value) and torch.equal(p.grad, gradient)
    assert not mean.requires_grad and not core.values().requires_grad


def test_several_threads_give_the_bits_of_one():
    ends, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(5)
            modules = [
                [torch.randn(s, requires_grad=True) for s in [(64, 3000), (3000, 64), (64, 1)]]
                for _ in range(3)
            ]
            core, mean, uncertainty = scores_of(modules, F32)
            step(modules, 0)
            core.observe_()
            ends.append([mean, uncertainty, core.values()])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


REFUSED = {
    "no module": ({"a": [], "b": [], "e": []}, ValueError, "a is empty"),
    "a module less": ({"b": []}, ValueError, "b has 0 entries; it must have 1"),
    "a vector": ({"a": [torch.zeros(6)]}, ValueError, r"a\[0\] has shape \[6\]; it must be a matrix"),
    "another rank": (
        {"b": [torch.zeros(4, 3)]},
        ValueError,
        r"b\[0\] has shape \[4, 3\]; it must be \[4, 2\]",
    ),
    "integers": ({"e": [torch.zeros(2, 1, dtype=torch.int64)]}, TypeError, r"e\[0\] has dtype Int64"),
    "too few slots": ({"mean": torch.zeros(15)}, ValueError, r"mean has shape \[15\]; it must be \[16\]"),
    "half a mean": ({"mean": torch.zeros(16, dtype=BF16)}, TypeError, "mean has dtype BFloat16"),
    "two dtypes": ({"uncertainty": torch.zeros(16, dtype=F64)}, TypeError, "uncertainty has dtype Double"),
    "a decay": ({"beta2": 1.0}, ValueError, "beta2 is 1; it must be at least 0 and below 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case):
    changed, error, message = REFUSED[case]
    arguments = {
        "a": [torch.zeros(2, 3)],
        "b": [torch.zeros(4, 2)],
        "e": [torch.zeros(2, 1)],
        "mean": torch.zeros(16),
        "uncertainty": torch.zeros(16),
        "beta1": 0.5,
        "beta2": 0.5,
    }
    TripletScores(**arguments)
    with pytest.raises(error, match=message):
        TripletScores(**(arguments | changed))


# The budget.


def of_the_paper(t, total, tinit, tfinal, interval, first, target):
    """Budget and mask of the authors' code at its step t."""
    if t <= tinit:
        return first, False
    if t > total - tfinal:
        return target, True
    left = 1 - (t - tinit) / (total - tfinal - tinit)
    return int(target + (first - target) * left**3), t % interval == 0


@pytest.mark.parametrize("total", [1, 2, 10, 137])
@pytest.mark.parametrize("interval", [1, 3, 10])
@pytest.mark.parametrize(("first", "target"), [(12, 8), (864, 576), (100, 1), (7, 6)])
def test_the_budget_is_that_of_the_authors_code(total, interval, first, target):
    for tinit in range(0, total, 7):
        for tfinal in range(0, total - tinit, 5):
            schedule = TripletSchedule(total, first, target, tinit=tinit, tfinal=tfinal, deltaT=interval)
            assert schedule.last == min(total - tfinal, total - 1) + 1
            for t in range(total):
                budget, masks = of_the_paper(t, total, tinit, tfinal, interval, first, target)
                number = t + 1
                if number < schedule.last:
                    assert (schedule.budget(number), schedule.is_event(number)) == (budget, masks)
                else:
                    assert schedule.budget(number) == target
                    assert schedule.is_event(number) is (number == schedule.last)
                    assert schedule.holds(number) is (number > schedule.last)
                assert schedule.observes(number) is (t < total - tfinal)


def test_a_schedule_says_what_it_is():
    schedule = TripletSchedule(1000, 12, 8)
    assert repr(schedule) == "TripletSchedule(1000, 12, 8, tinit=150, tfinal=425, deltaT=2)"
    assert schedule == TripletSchedule(1000, 12, 8, tinit=150, tfinal=425, deltaT=2)
    assert schedule != TripletSchedule(1000, 12, 8, tinit=150, tfinal=425, deltaT=3)
    assert (schedule.total_steps, schedule.first, schedule.target) == (1000, 12, 8)
    assert (schedule.tinit, schedule.tfinal, schedule.deltaT) == (150, 425, 2)


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        ((10, 4, 5), {}, "target is 5, but there are 4"),
        ((10, 5, 4), {"tinit": 6, "tfinal": 4}, "tinit=6 and tfinal=4 leave none of the 10 steps"),
        ((10, 5, 4), {"deltaT": 0}, "deltaT is 0"),
        ((2**63, 5, 4), {}, None),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments, given, message):
    if message is None:
        assert TripletSchedule(*arguments, **given).budget(2**63) == 4
        return
    with pytest.raises(ValueError, match=message):
        TripletSchedule(*arguments, **given)


# What is masked.


def test_the_highest_scores_are_live_and_of_equals_the_first():
    scores = np.array([0.5, 2.0, 0.5, 0.0, 0.5])
    for budget, wanted in enumerate([[], [1], [0, 1], [0, 1, 2], [0, 1, 2, 4], [0, 1, 2, 3, 4]]):
        live = _core.live_triplets(scores, budget)
        assert live.dtype == np.bool_
        assert np.flatnonzero(live).tolist() == wanted
    assert _core.live_triplets(scores, 9).all()
    with pytest.raises(TypeError):
        _core.live_triplets(scores.astype(np.float32), 1)
