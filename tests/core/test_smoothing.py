"""The smoothing of the importances over the optimizer steps (`smooth_` of src/policies/smoothing.rs) against
the formulas in plain Python floats.
"""

import math

import pytest
import torch
from increlora_rs import _core
from table_ids import describe
from torch import Tensor

F64 = torch.float64
MODULES = 5


def smoothed(steps, factor, beta1, beta2) -> tuple[list[float], list[float]]:
    """Ibar and U after `steps`, module by module."""
    mean, uncertainty = [0.0] * MODULES, [0.0] * MODULES
    for step in steps:
        for k in range(MODULES):
            importance = step[k] * factor[k]
            mean[k] = beta1 * mean[k] + (1 - beta1) * importance
            uncertainty[k] = beta2 * uncertainty[k] + (1 - beta2) * abs(importance - mean[k])
    return mean, uncertainty


def vectors(seed=0, count=1) -> Tensor:
    return torch.rand(count, MODULES, generator=torch.Generator().manual_seed(seed), dtype=F64) * 9


@pytest.mark.parametrize(("beta1", "beta2"), [(0.85, 0.85), (0.0, 0.0), (0.9, 0.3), (0.999, 0.0)])
def test_many_steps_follow_the_formulas(beta1, beta2):
    steps, factor = vectors(1, 200), vectors(2)[0]
    mean, uncertainty = torch.zeros(MODULES, dtype=F64), torch.zeros(MODULES, dtype=F64)
    for step in steps:
        _core.smooth_(step, factor, mean, uncertainty, beta1, beta2)
    want = smoothed(steps.tolist(), factor.tolist(), beta1, beta2)
    assert [mean.tolist(), uncertainty.tolist()] == [pytest.approx(w, rel=1e-10) for w in want]


def test_the_importance_itself_stays():
    importance, factor = vectors(1)[0], vectors(2)[0]
    _core.smooth_(importance, factor, *vectors(3, 2), 0.85, 0.85)
    assert torch.equal(importance, vectors(1)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["importance", "factor"])
def test_a_step_that_is_not_finite_changes_nothing(where, bad):
    arguments = {"importance": vectors(1)[0], "factor": vectors(2)[0]}
    arguments[where][3] = bad
    mean, uncertainty = vectors(3, 2)
    _core.smooth_(**arguments, mean=mean, uncertainty=uncertainty, beta1=0.85, beta2=0.85)
    assert torch.equal(torch.stack([mean, uncertainty]), vectors(3, 2))


def test_the_step_after_one_that_is_not_finite_counts():
    steps = vectors(1, 3)
    mean, uncertainty = torch.zeros(MODULES, dtype=F64), torch.zeros(MODULES, dtype=F64)
    bad = torch.full((MODULES,), math.inf, dtype=F64)
    for step in (steps[0], bad, steps[1], steps[2]):
        _core.smooth_(step, torch.ones(MODULES, dtype=F64), mean, uncertainty, 0.85, 0.85)
    want = smoothed(steps.tolist(), [1.0] * MODULES, 0.85, 0.85)
    assert [mean.tolist(), uncertainty.tolist()] == [pytest.approx(w, rel=1e-10) for w in want]


def test_strided_vectors_are_smoothed_in_place():
    storage = torch.zeros(MODULES, 2, dtype=F64)
    step, factor = vectors(1)[0], vectors(2)[0]
    _core.smooth_(step, factor, storage[:, 0], storage[:, 1], 0.85, 0.5)
    want = smoothed([step.tolist()], factor.tolist(), 0.85, 0.5)
    assert storage.T.tolist() == [pytest.approx(w, rel=1e-10) for w in want]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *[
            (name, value, error)
            for name in ("importance", "factor", "mean", "uncertainty")
            for value, error in [
                (torch.ones(MODULES, 1, dtype=F64), ValueError),
                (torch.tensor(1.0, dtype=F64), ValueError),
                (torch.ones(MODULES), TypeError),
                (torch.ones(MODULES, dtype=torch.int64), TypeError),
                (torch.ones(MODULES, dtype=torch.complex128), TypeError),
                (torch.ones(MODULES, dtype=F64, device="meta"), ValueError),
                ([1.0] * MODULES, TypeError),
            ]
        ],
        *[
            (name, torch.ones(length, dtype=F64), ValueError)
            for name in ("factor", "mean", "uncertainty")
            for length in (1, MODULES + 1)
        ],
        *[
            (name, value, error)
            for name in ("beta1", "beta2")
            for value, error in [
                (1.0, ValueError),
                (-0.1, ValueError),
                (1.5, ValueError),
                (math.nan, ValueError),
                ("0.85", TypeError),
            ]
        ],
    ],
    ids=describe,
)
def test_bad_input_is_refused_by_name(name, value, error):
    mean, uncertainty = vectors(3, 2)
    good = {"importance": vectors(1)[0], "factor": vectors(2)[0], "mean": mean, "uncertainty": uncertainty}
    with pytest.raises(error, match=rf"\b{name}\b"):
        _core.smooth_(**good | {"beta1": 0.85, "beta2": 0.85} | {name: value})


def test_matrices_are_no_vectors():
    with pytest.raises(ValueError, match="importance"):
        _core.smooth_(*[torch.ones(2, 3, dtype=F64) for _ in range(4)], 0.85, 0.85)
