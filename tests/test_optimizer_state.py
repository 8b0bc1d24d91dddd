"""An optimizer's state after a parameter grew or shrank in place: kept where it can be, else dropped."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from increlora_rs import optimizer_state
from increlora_rs.optimizer_state import resize_state, watch
from torch import nn
from transformers import Adafactor as TransformersAdafactor

WIDE, RANK = 6, 2

# Optimizers whose update of an element depends on nothing but that element's gradients.
ELEMENTWISE = {
    "SGD momentum": lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam([p], lr=0.1),
    "Adam amsgrad": lambda p: torch.optim.Adam([p], lr=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW([p], lr=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW([p], lr=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW([p], lr=0.1, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop([p], lr=0.1, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad([p], lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta([p], lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax([p], lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam([p], lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam([p], lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD([p], lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop([p], lr=0.1),
}
FACTORED = {
    "Adafactor": lambda p: torch.optim.Adafactor([p], lr=0.1),
    "transformers' Adafactor": lambda p: TransformersAdafactor([p], lr=0.1, relative_step=False),
}
WHOLE = {"Muon": lambda p: torch.optim.Muon([p], lr=0.1)}

# Shape at a rank, and the dimension along which it grows.
SHAPES = {
    "A": (lambda rank: (rank, WIDE), 0),
    "B": (lambda rank: (WIDE, rank), 1),
    "E": (lambda rank: (rank, 1), 0),
}


def cases(optimizers):
    rows = [
        pytest.param(make, shape, dim, rank, id=f"{name} {factor} rank {rank}")
        for name, make in optimizers.items()
        for factor, (shape, dim) in SHAPES.items()
        for rank in (1, RANK)
    ]
    return pytest.mark.parametrize(("make", "shape", "dim", "rank"), rows)


def numbers(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(make, shape, steps=3):
    """A parameter and its optimizer after a few steps on fixed gradients."""
    parameter = nn.Parameter(numbers(shape, 0))
    optimizer = make(parameter)
    for step in range(steps):
        parameter.grad = numbers(shape, 10 + step)
        optimizer.step()
    return parameter, optimizer


def resized(value, shape, dim):
    """``value`` with zeros appended, or cut, to ``shape``."""
    new = torch.zeros(shape)
    keep = min(shape[dim], value.shape[dim])
    new.narrow(dim, 0, keep).copy_(value.narrow(dim, 0, keep))
    return new


def set_size(parameter, shape, dim):
    with torch.no_grad():
        parameter.set_(resized(parameter.detach(), shape, dim))
    parameter.grad = None


def quietly_resize(optimizer, parameter, dim):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resize_state(optimizer, parameter, dim)


@cases(ELEMENTWISE)
@pytest.mark.parametrize("more", [1, 3])
@pytest.mark.filterwarnings("error")
def test_old_rows_go_on_as_if_nothing_had_grown(make, shape, dim, rank, more):
    twin, twin_optimizer = stepped(make, shape(rank))
    parameter, optimizer = stepped(make, shape(rank))
    set_size(parameter, shape(rank + more), dim)
    resize_state(optimizer, parameter, dim)
    for seed in (20, 21):
        gradient = numbers(shape(rank + more), seed)
        parameter.grad = gradient.clone()
        twin.grad = gradient.narrow(dim, 0, rank).clone()
        optimizer.step()
        twin_optimizer.step()
    torch.testing.assert_close(parameter.narrow(dim, 0, rank), twin, rtol=1e-6, atol=1e-7)


@cases(ELEMENTWISE)
@pytest.mark.filterwarnings("error")
def test_remaining_rows_go_on_after_a_cut(make, shape, dim, rank):
    twin, twin_optimizer = stepped(make, shape(rank + 2))
    parameter, optimizer = stepped(make, shape(rank + 2))
    set_size(parameter, shape(rank), dim)
    resize_state(optimizer, parameter, dim)
    gradient = numbers(shape(rank + 2), 20)
    parameter.grad = gradient.narrow(dim, 0, rank).clone()
    twin.grad = gradient
    optimizer.step()
    twin_optimizer.step()
    torch.testing.assert_close(parameter, twin.narrow(dim, 0, rank).detach(), rtol=1e-6, atol=1e-7)


@cases(ELEMENTWISE | FACTORED | WHOLE)
def test_new_rows_are_trained_with_finite_numbers(make, shape, dim, rank):
    parameter, optimizer = stepped(make, shape(rank))
    set_size(parameter, shape(rank + 2), dim)
    quietly_resize(optimizer, parameter, dim)
    for seed in range(20, 25):
        parameter.grad = numbers(shape(rank + 2), seed)
        optimizer.step()
    new = parameter.detach().narrow(dim, rank, 2)
    assert torch.isfinite(new).all()
    assert new.ne(0).all()


@cases(FACTORED)
def test_state_that_cannot_follow_is_dropped_whole_with_a_warning(make, shape, dim, rank):
    parameter, optimizer = stepped(make, shape(rank))
    set_size(parameter, shape(rank + 1), dim)
    with pytest.warns(UserWarning, match="Adafactor"):
        resize_state(optimizer, parameter, dim)
    assert parameter not in optimizer.state


@pytest.mark.parametrize(("factor", "shape"), [(name, shape) for name, (shape, _) in SHAPES.items()])
def test_adams_moments_get_zeros_at_the_end(factor, shape):
    dim = SHAPES[factor][1]
    parameter, optimizer = stepped(ELEMENTWISE["Adam"], shape(RANK))
    before = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    set_size(parameter, shape(5), dim)
    resize_state(optimizer, parameter, dim)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[parameter][key], resized(before[key], shape(5), dim))


def test_step_count_stays():
    parameter, optimizer = stepped(ELEMENTWISE["Adam"], (RANK, WIDE))
    set_size(parameter, (5, WIDE), 0)
    resize_state(optimizer, parameter, 0)
    assert float(optimizer.state[parameter]["step"]) == 3.0


def test_unchanged_parameter_keeps_its_state():
    parameter, optimizer = stepped(ELEMENTWISE["Adam"], (RANK, WIDE))
    before = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    resize_state(optimizer, parameter, 0)
    assert {key: value.tolist() for key, value in optimizer.state[parameter].items()} == {
        key: value.tolist() for key, value in before.items()
    }


def test_parameter_without_state_is_left_without():
    parameter = nn.Parameter(torch.zeros(RANK, WIDE))
    optimizer = ELEMENTWISE["Adam"](parameter)
    resize_state(optimizer, parameter, 0)
    assert parameter not in optimizer.state


def test_state_of_other_parameters_is_left_alone():
    parameter, other = (nn.Parameter(numbers((RANK, WIDE), seed)) for seed in (0, 1))
    optimizer = torch.optim.Adam([parameter, other], lr=0.1)
    parameter.grad, other.grad = numbers((RANK, WIDE), 2), numbers((RANK, WIDE), 3)
    optimizer.step()
    before = optimizer.state[other]["exp_avg"].clone()
    set_size(parameter, (5, WIDE), 0)
    resize_state(optimizer, parameter, 0)
    assert torch.equal(optimizer.state[other]["exp_avg"], before)


class Quantised(torch.optim.SGD):
    """Keeps a moment in blocks, in a shape of its own, as 8-bit optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "blocks" not in state:
                    state["blocks"] = torch.zeros(parameter.numel(), dtype=torch.uint8)
                    state["absmax"] = torch.zeros(1)
                    state["label"] = "first"
                assert state["blocks"].numel() == parameter.numel()
        return super().step(closure)


def test_unknown_state_is_dropped_with_a_warning_that_names_it():
    parameter, optimizer = stepped(lambda p: Quantised([p], lr=0.1), (RANK, WIDE))
    set_size(parameter, (5, WIDE), 0)
    with pytest.warns(UserWarning, match=r"'blocks' of Quantised.*\(12,\).*\(5, 6\)"):
        resize_state(optimizer, parameter, 0)
    assert parameter not in optimizer.state


def test_optimizer_of_unknown_state_goes_on():
    parameter, optimizer = stepped(lambda p: Quantised([p], lr=0.1), (RANK, WIDE))
    set_size(parameter, (5, WIDE), 0)
    quietly_resize(optimizer, parameter, 0)
    before = parameter.detach().clone()
    parameter.grad = numbers((5, WIDE), 20)
    optimizer.step()
    assert parameter.ne(before).all()


# The net under optimizers that no scheduler looks after.


def test_loaded_state_of_another_size_is_noticed_after_a_look_that_found_nothing():
    parameter, optimizer = stepped(ELEMENTWISE["AdamW fused"], (RANK, WIDE))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    set_size(parameter, (5, WIDE), 0)
    watch(parameter)
    quietly_resize(optimizer, parameter, 0)
    for step in range(2):
        parameter.grad = numbers((5, WIDE), step)
        optimizer.step()
    optimizer.load_state_dict(checkpoint)
    with pytest.warns(UserWarning, match="changed its rank without the optimizer"):
        optimizer.step()


def test_a_second_optimizer_is_looked_at_too():
    parameter, first = stepped(ELEMENTWISE["AdamW"], (RANK, WIDE))
    second = torch.optim.AdamW([parameter], lr=0.1)
    second.load_state_dict(first.state_dict())
    set_size(parameter, (5, WIDE), 0)
    watch(parameter)
    parameter.grad = numbers((5, WIDE), 20)
    for optimizer in (first, second):
        with pytest.warns(UserWarning, match="changed its rank without the optimizer"):
            optimizer.step()


def test_parameters_are_not_looked_at_in_every_step(monkeypatch):
    parameter, optimizer = stepped(ELEMENTWISE["AdamW"], (RANK, WIDE))
    watch(parameter)
    optimizer.step()
    monkeypatch.setattr(optimizer_state, "_resized_parameters", None)
    optimizer.step()


def test_what_was_looked_at_keeps_no_optimizer_alive():
    parameter, optimizer = stepped(ELEMENTWISE["AdamW"], (RANK, WIDE))
    watch(parameter)
    optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
