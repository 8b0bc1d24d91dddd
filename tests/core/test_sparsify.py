"""PRILoRA's running norms and its pruning (src/policies/sparsify.rs), against the formulas taken number by
number in float64."""

import math
from fractions import Fraction

import pytest
import torch
from increlora_rs import _core

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [F64, F32, BF16, FP16]


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def pruned(a, norms, share=0.5, by_row=True):
    a = [one.clone() for one in a]
    _core.prune_(a, norms, share, by_row=by_row)
    return a


def literal(a, norms, share, by_row):
    """In each group the floor(share n) entries of smallest score, of equal ones the first, become 0."""
    scores = [[abs(w) * v for w, v in zip(row, norms.tolist(), strict=True)] for row in a.double().tolist()]
    if not by_row:
        scores = [[score for row in scores for score in row]]
    keep = []
    for group in scores:
        count = math.floor(Fraction(str(share)) * len(group))
        gone = sorted(range(len(group)), key=lambda i, group=group: (group[i], i))[:count]
        keep.append([float(i not in gone) for i in range(len(group))])
    return a * torch.tensor(keep, dtype=a.dtype).reshape(a.shape)


# The running norms.


def test_the_norm_is_the_root_of_the_mean_square_averaged_over_the_steps():
    norms = torch.zeros(5, dtype=F64)
    wanted = [0.0] * 5
    for step in range(4):
        sums, counts = draw(5, seed=step).square(), (3.0 + step, 7.0)
        total = torch.cat([sums[:2], torch.tensor([counts[0]]), sums[2:], torch.tensor([counts[1]])])
        _core.average_energy_(norms, total, [2, 3], 0.9)
        assert not total.any()
        of_each = [counts[0]] * 2 + [counts[1]] * 3
        roots = [math.sqrt(s / n) for s, n in zip(sums.tolist(), of_each, strict=True)]
        wanted = [0.9 * v + 0.1 * n for v, n in zip(wanted, roots, strict=True)]
    assert norms.tolist() == pytest.approx(wanted, rel=1e-12)


def test_a_module_without_a_token_and_a_feature_that_is_not_finite_stay_as_they_are():
    norms = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    total = torch.tensor([math.inf, 4.0, 1.0, 0.0, 0.0], dtype=F64)
    _core.average_energy_(norms, total, [2, 1], 0.5)
    assert norms.tolist() == [1.0, 2.0, 3.0]
    assert not total.any()


BAD_AVERAGE = [
    ({"beta": 1.0}, ValueError, "beta is 1"),
    ({"beta": math.nan}, ValueError, "beta is NaN"),
    ({"norms": torch.zeros(3)}, TypeError, "norms has dtype Float"),
    ({"norms": torch.zeros(2, dtype=F64)}, ValueError, r"norms has 2 numbers.*\[2, 1\]"),
    ({"total": torch.zeros(4, dtype=F64)}, ValueError, r"total has shape \[4\].*\[5\]"),
    ({"total": torch.zeros(5)}, TypeError, "total has dtype Float"),
    ({"features": [4, -1]}, ValueError, r"norms has 3 numbers.*\[4, -1\]"),
]


@pytest.mark.parametrize(("bad", "error", "told"), BAD_AVERAGE, ids=[told for _, _, told in BAD_AVERAGE])
def test_a_bad_argument_of_the_average_is_refused_by_name(bad, error, told):
    zeros = {"norms": torch.zeros(3, dtype=F64), "total": torch.zeros(5, dtype=F64)}
    with pytest.raises(error, match=told):
        _core.average_energy_(**{**zeros, "features": [2, 1], "beta": 0.9, **bad})


# The pruning.


@pytest.mark.parametrize("by_row", [True, False], ids=["row", "matrix"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.29, 0.5, 0.77, 1.0])
def test_the_entries_of_smallest_size_times_norm_go(share, dtype, by_row):
    a = [draw(3, 100, seed=1, dtype=dtype), draw(5, 7, seed=2, dtype=dtype)]
    norms = draw(107, seed=3).abs()
    found = pruned(a, norms, share, by_row)
    for one, of_one, given in zip(found, norms.split([100, 7]), a, strict=True):
        assert torch.equal(one, literal(given, of_one, share, by_row))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_has_exactly_so_many_zeros(dtype):
    a = draw(4, 33, dtype=dtype)
    (found,) = pruned([a], draw(33, seed=1).abs(), 0.5)
    assert (found == 0).sum(1).tolist() == [16] * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_entries_the_first_go(dtype):
    a = torch.ones(2, 6, dtype=dtype)
    for by_row, wanted in ((True, [[0] * 3 + [1] * 3] * 2), (False, [[0] * 6, [1] * 6])):
        (found,) = pruned([a], torch.ones(6, dtype=F64), 0.5, by_row)
        assert found.tolist() == wanted


@pytest.mark.parametrize("by_row", [True, False], ids=["row", "matrix"])
def test_a_norm_that_is_the_same_everywhere_leaves_the_choice_to_the_size(by_row):
    a = draw(3, 40)
    (found,) = pruned([a], torch.full((40,), 2.5, dtype=F64), 0.3, by_row)
    kept = a.abs().flatten(0 if not by_row else 1)
    bound = kept.sort(-1)[0][..., math.floor(0.3 * kept.shape[-1]) - 1]
    wanted = torch.where(a.abs() > (bound.unsqueeze(-1) if by_row else bound), a, 0.0)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_all_norms_changes_nothing(dtype):
    a, norms = draw(6, 50, dtype=dtype), draw(50, seed=1).abs()
    (wanted,) = pruned([a], norms)
    for factor in (1e-6, 0.25, 3.0, 1e9):
        assert torch.equal(pruned([a], factor * norms)[0], wanted)


def test_what_was_0_is_among_the_smallest():
    a, norms = draw(2, 10), torch.ones(10, dtype=F64)
    (once,) = pruned([a], norms)
    assert torch.equal(pruned([once], norms)[0], once)


def test_any_layout():
    a, norms = draw(4, 9, dtype=F32), draw(9, seed=1).abs()
    (wanted,) = pruned([a], norms)
    strided = a.t().contiguous().t()
    _core.prune_([strided], norms, 0.5, by_row=True)
    assert torch.equal(strided, wanted)


def test_a_parameter_is_pruned_in_place_outside_of_its_graph():
    a = torch.nn.Parameter(draw(2, 8))
    _core.prune_([a], torch.ones(8, dtype=F64), 0.5, by_row=True)
    assert int((a == 0).sum()) == 8
    assert a.is_leaf and a.requires_grad


BAD_PRUNING = [
    ({"share": -0.1}, ValueError, "share is -0.1"),
    ({"share": 1.1}, ValueError, "share is 1.1"),
    ({"norms": torch.zeros(2, dtype=F64)}, ValueError, r"norms has 2 numbers.*\[3\]"),
    ({"norms": torch.zeros(3)}, TypeError, "norms has dtype Float"),
    ({"a": [torch.zeros(3)]}, ValueError, r"a\[0\] has shape \[3\]"),
    ({"a": [torch.zeros(1, 3, dtype=torch.int32)]}, TypeError, r"a\[0\] has dtype Int"),
]


@pytest.mark.parametrize(("bad", "error", "told"), BAD_PRUNING, ids=[told for _, _, told in BAD_PRUNING])
def test_a_bad_argument_of_the_pruning_is_refused_by_name(bad, error, told):
    good = {"a": [torch.zeros(2, 3)], "norms": torch.zeros(3, dtype=F64), "share": 0.5, "by_row": True}
    with pytest.raises(error, match=told):
        _core.prune_(**{**good, **bad})
