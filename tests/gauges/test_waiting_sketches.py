"""Sketches that wait for the next backward pass before they go into their sum: nobody sees it."""

import pytest
import torch
from increlora_rs.gauges import Sketches

SIZES = [(5, 4), (6, 7), (5, 4)]


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn():
    gauge = Sketches(torch.zeros(0, dtype=torch.float64), SIZES)
    gauge.draw((3, 7), 1)
    return gauge


def add(gauge, slots, seed):
    for slot in slots:
        out, features = SIZES[slot]
        gauge.add(slot, normal(9, out, seed=seed + slot), normal(9, features, seed=seed + 10 + slot))


def of_step(slots, seed):
    gauge = drawn()
    add(gauge, slots, seed)
    return gauge.total.clone()


ALL = (0, 1, 2)


@pytest.mark.parametrize("third", [ALL, (1,), ()])
@pytest.mark.parametrize("looked_at", [False, True])
def test_the_sum_is_of_all_steps_and_the_total_of_one(third, looked_at):
    gauge, steps, want = drawn(), torch.zeros(1, dtype=torch.float64), 0.0
    for seed, slots in ((100, ALL), (200, ALL), (300, third)):
        add(gauge, slots, seed)
        if looked_at:
            assert torch.equal(gauge.total, of_step(slots, seed))
        gauge.take_(steps)
        want = want + of_step(slots, seed)
        if looked_at:
            assert not gauge.total.any()
    assert steps.item() == 3.0
    assert torch.equal(gauge.sum, want)
    assert not gauge.total.any()


def test_a_step_that_is_not_finite_is_left_out_whole():
    gauge, steps = drawn(), torch.zeros(1, dtype=torch.float64)
    add(gauge, ALL, 100)
    gauge.take_(steps)
    add(gauge, ALL, 200)
    gauge.add(1, normal(9, 6, seed=3) * float("inf"), normal(9, 7, seed=4))
    gauge.take_(steps)
    add(gauge, ALL, 300)
    gauge.take_(steps)
    assert steps.item() == 2.0
    assert torch.equal(gauge.sum, of_step(ALL, 100) + of_step(ALL, 300))


def test_what_a_graph_adds_by_the_collectors_is_taken_too():
    gauge, steps = drawn(), torch.zeros(1, dtype=torch.float64)
    for seed in (100, 200):
        add(gauge, (0, 2), seed)
        # As autograd does with the gradient of a leaf.
        gauge.collector(1).grad.add_(1.0)
        gauge.take_(steps)
    lengths = [3 * out + 7 * features for out, features in SIZES]
    first, middle, last = gauge.sum.split(lengths)
    assert torch.equal(middle, torch.full_like(middle, 2.0))
    want = of_step((0, 2), 100) + of_step((0, 2), 200)
    assert torch.equal(first, want.split(lengths)[0])
    assert torch.equal(last, want.split(lengths)[2])


def test_a_batch_that_is_dropped_takes_nothing_of_the_steps_before():
    gauge, steps = drawn(), torch.zeros(1, dtype=torch.float64)
    add(gauge, ALL, 100)
    gauge.take_(steps)
    add(gauge, (0,), 200)
    gauge.total.zero_()
    assert torch.equal(gauge.sum, of_step(ALL, 100))
