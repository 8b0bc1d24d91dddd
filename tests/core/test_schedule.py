"""The schedule of growth and the choice of modules (src/policies/growth.rs) as Python sees them; its
properties over many plans are tested beside the code.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from increlora_rs import _core
from table_ids import describe


def u64(*values) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def plan(steps=1000, modules=72, first=1, cap=768, budget=144, **given) -> _core.Schedule:
    ranks, caps = np.full(modules, first, np.uint64), np.full(modules, cap, np.uint64)
    return _core.Schedule(steps, ranks, caps, budget, **given)


def numbers(schedule) -> tuple[int, int, int, int, int]:
    return schedule.tinit, schedule.deltaT, schedule.top_h, schedule.add_r, schedule.reached


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        pytest.param({}, (50, 10, 15, 1, 144), id="average rank 2"),
        pytest.param({"budget": 576}, (50, 10, 51, 2, 576), id="average rank 8"),
        pytest.param({"growth_end": 0.6}, (100, 10, 2, 1, 144), id="late, average rank 2"),
        pytest.param({"growth_end": 0.6, "budget": 576}, (100, 10, 11, 1, 576), id="late, average rank 8"),
        pytest.param({"steps": 10_000}, (500, 10, 2, 1, 144), id="long run"),
        pytest.param({"steps": 10_000, "growth_end": 0.6}, (1000, 100, 2, 1, 144), id="late, long run"),
        pytest.param({"modules": 4, "budget": 8}, (50, 12, 1, 1, 8), id="few modules"),
        pytest.param({"steps": 1, "budget": 360}, (0, 1, 72, 4, 360), id="one step"),
        pytest.param({"budget": 72}, (50, 50, 1, 1, 72), id="nothing to do"),
        pytest.param({"tinit": 100, "deltaT": 100, "top_h": 2}, (100, 100, 2, 1, 90), id="all given"),
        pytest.param({"tinit": 1000}, (1000, 10, 1, 1, 72), id="warm-up without end"),
        pytest.param({"top_h": 4, "add_r": 3}, (50, 10, 4, 3, 144), id="top_h given"),
    ],
)
def test_plans_are_as_worked_out_by_hand(arguments, want):
    assert numbers(plan(**arguments)) == want


def test_events_are_multiples_of_the_interval_past_the_warm_up():
    schedule = plan(tinit=30, deltaT=20)
    assert [step for step in range(1, 121) if schedule.is_event(step)] == [40, 60, 80, 100, 120]


def test_a_warm_up_that_ends_on_a_multiple_waits_for_the_next():
    assert plan(tinit=40, deltaT=20).next_event(1) == 60


@pytest.mark.parametrize(("step", "event"), [(1, 40), (40, 40), (41, 60), (119, 120), (10**12, 10**12)])
def test_the_next_event_is_at_or_after_the_step(step, event):
    assert plan(tinit=30, deltaT=20).next_event(step) == event


def test_the_warm_up_is_over_before_the_first_event():
    assert plan().next_event(1) > 50


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 100_000), st.integers(1, 60), st.integers(0, 4), st.integers(1, 12), st.integers(0, 2**32)
)
def test_budget_is_met_exactly(steps, modules, first, room, seed):
    random = np.random.default_rng(seed)
    ranks = random.integers(0, first + 1, modules).astype(np.uint64)
    caps = ranks + random.integers(0, room + 1, modules).astype(np.uint64)
    budget = int(random.integers(ranks.sum(), caps.sum() + 1))
    schedule = _core.Schedule(steps, ranks, caps, budget)
    step = schedule.next_event(1)
    while step <= steps and ranks.sum() < budget:
        for module, gained in schedule.choose(random.random(modules), ranks, caps, budget):
            ranks[module] += np.uint64(gained)
        step = schedule.next_event(step + 1)
    assert (int(ranks.sum()), bool((ranks <= caps).all())) == (budget, True)


@pytest.mark.parametrize(
    ("given", "end", "last"),
    [
        pytest.param({}, 100, 100, id="automatic"),
        pytest.param({"tinit": 200}, 250, 250, id="a warm-up past the end"),
        pytest.param({"deltaT": 300}, 100, 300, id="an interval past the end"),
        pytest.param({"top_h": 3}, 100, 290, id="a low top_h"),
        pytest.param({"budget": 72}, 100, 0, id="nothing to grow"),
    ],
)
def test_the_end_and_the_last_growth_are_told(given, end, last):
    schedule = plan(**given)
    assert (schedule.end, schedule.last) == (end, last)


@pytest.mark.parametrize(
    ("growth_end", "tinit", "last"), [(0.6, 100, 600), (0.3, 100, 300), (0.1, 50, 100), (1.0, 100, 1000)]
)
def test_growth_is_over_at_its_share_of_the_steps(growth_end, tinit, last):
    schedule = _core.Schedule(
        1000, np.ones(72, np.uint64), np.full(72, 64, np.uint64), 576, growth_end=growth_end
    )
    assert schedule.tinit == tinit
    steps = range(1, last + 1)
    assert sum(map(schedule.is_event, steps)) * schedule.top_h * schedule.add_r >= 576 - 72
    assert 0.8 * last <= max(step for step in steps if schedule.is_event(step)) <= last


def chosen(scores, ranks=(1, 1, 1, 1), cap=9, budget=99, top_h=2, add_r=2) -> list[tuple[int, int]]:
    schedule = plan(modules=len(ranks), budget=4 * len(ranks), top_h=top_h, add_r=add_r)
    caps = np.full(len(ranks), cap, np.uint64)
    return schedule.choose(np.array(scores, dtype=np.float64), u64(*ranks), caps, budget)


def test_the_highest_scores_grow():
    assert chosen([1.0, 4.0, 2.0, 3.0]) == [(1, 2), (3, 2)]


def test_ties_go_to_the_first_modules():
    assert chosen([0.0, 0.0, 0.0, 0.0]) == [(0, 2), (1, 2)]


def test_scores_within_the_bound_are_ties():
    near, far = 1 - 0.9e-5, 1 - 1.1e-5
    assert chosen([near, 1.0, near, 1.0]) == [(0, 2), (1, 2)]
    assert chosen([far, 1.0, far, 1.0]) == [(1, 2), (3, 2)]


def test_a_score_that_is_not_a_number_comes_last():
    assert chosen([np.nan, -1.0, np.nan, -2.0]) == [(1, 2), (3, 2)]


def test_a_full_module_yields_to_the_next_best():
    assert chosen([4.0, 3.0, 2.0, 1.0], ranks=(9, 1, 9, 1)) == [(1, 2), (3, 2)]


def test_a_module_stops_at_its_cap():
    assert chosen([4.0, 3.0, 2.0, 1.0], ranks=(8, 1, 1, 1)) == [(0, 1), (1, 2)]


def test_the_last_event_stops_at_the_budget():
    assert chosen([4.0, 3.0, 2.0, 1.0], budget=7) == [(0, 2), (1, 1)]


def test_a_spent_budget_grows_nothing():
    assert chosen([4.0, 3.0, 2.0, 1.0], budget=4) == []


def test_full_modules_grow_nothing():
    assert chosen([4.0, 3.0], ranks=(9, 9)) == []


def test_choosing_changes_no_argument():
    ranks = u64(1, 1, 1, 1)
    plan(modules=4, budget=8).choose(np.ones(4), ranks, u64(9, 9, 9, 9), 8)
    assert ranks.tolist() == [1, 1, 1, 1]


def test_equal_schedules_are_equal():
    assert plan() == plan()


def test_different_schedules_differ():
    assert plan() != plan(deltaT=20)


def test_a_schedule_shows_its_numbers():
    assert repr(plan()) == "Schedule(tinit=50, deltaT=10, top_h=15, add_r=1)"


def test_a_schedule_cannot_be_changed():
    with pytest.raises(AttributeError, match="top_h"):
        plan().top_h = 3


@pytest.mark.parametrize(
    ("beta1", "beta2", "steps"),
    [(0.85, 0.85, 43), (0.85, 0.5, 43), (0.5, 0.85, 43), (0.0, 0.0, 1), (0.9, 0, 66)],
)
def test_the_window_ends_where_a_value_weighs_less_than_a_thousandth(beta1, beta2, steps):
    assert _core.importance_window(beta1, beta2) == steps


def test_the_window_of_the_largest_beta_is_found_at_once():
    assert _core.importance_window(1 - 2**-53, 0.0) == pytest.approx(np.log(1000) * 2**53, rel=1e-9)


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize(
    ("beta", "error"),
    [
        (1.0, ValueError),
        (-0.1, ValueError),
        (float("nan"), ValueError),
        (None, TypeError),
        ("0.85", TypeError),
    ],
    ids=describe,
)
def test_the_window_refuses_a_beta_by_name(name, beta, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        _core.importance_window(**{"beta1": 0.85, "beta2": 0.85, name: beta})


NO_VECTORS = [
    (np.array([1, 1]), TypeError),
    (np.array([1.0, 1.0]), TypeError),
    (u64(1, 1)[None], TypeError),
    (u64(1, 7, 1, 7)[::2], TypeError),
    ([1, 1], TypeError),
    (None, TypeError),
    (u64(1, 1, 1), ValueError),
    (u64(), ValueError),
]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("total_steps", 0, ValueError),
        ("total_steps", 1.5, TypeError),
        ("total_steps", None, TypeError),
        ("budget", "8", TypeError),
        ("tinit", 1.5, TypeError),
        ("deltaT", 0, ValueError),
        ("top_h", 0, ValueError),
        ("add_r", 0, ValueError),
        ("add_r", None, TypeError),
        ("growth_end", 0.0, ValueError),
        ("growth_end", 1.01, ValueError),
        ("growth_end", float("nan"), ValueError),
        ("growth_end", None, TypeError),
        *[(name, *row) for name in ("ranks", "caps") for row in NO_VECTORS],
    ],
    ids=describe,
)
def test_a_schedule_refuses_by_name(name, value, error):
    good = {"total_steps": 100, "ranks": u64(1, 1), "caps": u64(4, 4), "budget": 4}
    with pytest.raises(error, match=rf"\b{name}\b"):
        _core.Schedule(**good | {name: value})


@pytest.mark.parametrize("name", ["total_steps", "budget", "tinit", "deltaT", "top_h", "add_r"])
@pytest.mark.parametrize("value", [-1, 2**64])
def test_a_number_outside_64_bits_is_an_overflow(name, value):
    good = {"total_steps": 100, "ranks": u64(1, 1), "caps": u64(4, 4), "budget": 4}
    with pytest.raises(OverflowError):
        _core.Schedule(**good | {name: value})


def test_a_first_rank_past_its_cap_is_refused_with_its_module():
    with pytest.raises(ValueError, match="module 1 has rank 5"):
        _core.Schedule(100, u64(1, 5), u64(4, 4), 8)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("scores", np.ones(3), ValueError),
        ("scores", np.ones(2, np.float32), TypeError),
        ("scores", np.ones((2, 1)), TypeError),
        ("scores", np.ones(4)[::2], TypeError),
        ("scores", [1.0, 1.0], TypeError),
        ("budget", None, TypeError),
        *[(name, *row) for name in ("ranks", "caps") for row in NO_VECTORS],
    ],
    ids=describe,
)
def test_a_choice_refuses_by_name(name, value, error):
    good = {"scores": np.ones(2), "ranks": u64(1, 1), "caps": u64(4, 4), "budget": 4}
    with pytest.raises(error, match=rf"\b{name}\b"):
        plan(modules=2, budget=4).choose(**good | {name: value})


def test_a_choice_refuses_a_rank_past_its_cap():
    with pytest.raises(ValueError, match="module 0 has rank 5"):
        plan(modules=2, budget=4).choose(np.ones(2), u64(5, 1), u64(4, 4), 9)


@pytest.mark.parametrize("method", ["is_event", "next_event"])
@pytest.mark.parametrize(
    ("step", "error"), [(-1, OverflowError), (1.5, TypeError), (None, TypeError)], ids=describe
)
def test_a_step_that_is_none_is_refused(method, step, error):
    with pytest.raises(error):
        getattr(plan(), method)(step)


# Components that cost more than 1.


def priced(costs, budget, ranks=(1, 1), cap=9, **given) -> _core.Schedule:
    caps = np.full(len(ranks), cap, np.uint64)
    return _core.Schedule(100, u64(*ranks), caps, budget, costs=u64(*costs), **given)


def test_costs_of_one_are_the_default():
    ranks, caps = u64(1, 1), u64(9, 9)
    plain = _core.Schedule(100, ranks, caps, 8)
    assert numbers(plain) == numbers(_core.Schedule(100, ranks, caps, 8, costs=u64(1, 1)))


def test_the_score_for_the_cost_decides_and_the_budget_holds():
    schedule = priced([3, 10], 39, tinit=0, deltaT=10, top_h=1)
    scores = np.array([3.0, 11.0])
    assert schedule.choose(scores, u64(1, 1), u64(9, 9), 39) == [(1, 1)]
    assert schedule.choose(scores, u64(1, 3), u64(9, 9), 39) == [(0, 2)]
    assert schedule.choose(scores, u64(3, 3), u64(9, 9), 39) == []


def test_what_is_sure_to_be_reached_is_in_the_unit_of_the_costs():
    schedule = priced([3, 10], 100, tinit=0, deltaT=50, top_h=1)
    assert (schedule.reached, schedule.possible) == (19, 33)


@pytest.mark.parametrize(
    ("costs", "message"),
    [([3], "costs has 1 entries and ranks 2"), ([3, 0], "costs has a 0; give 1 or more")],
)
def test_wrong_costs_are_named(costs, message):
    with pytest.raises(ValueError, match=message):
        priced(costs, 100)
