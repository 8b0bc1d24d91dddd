"""An optimizer's state after a parameter grew or shrank in place: kept where it can be, else dropped."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from increlora_rs.resizing import optimizer_state
from increlora_rs.resizing.optimizer_state import resize_state, watch
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


# New rows start as the optimizer starts them.

STARTS = {
    "Rprop": lambda p: torch.optim.Rprop([p], lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad([p], lr=0.1, initial_accumulator_value=0.3),
    "ASGD": lambda p: torch.optim.ASGD([p], lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW([p], lr=0.1, amsgrad=True),
    "Muon": lambda p: torch.optim.Muon([p], lr=0.1),
}


@pytest.mark.parametrize("name", [name for name in STARTS if name != "Muon"])
def test_a_new_rows_state_is_that_of_a_new_parameter(name):
    """By what its first step does to the rows: as to a parameter that holds them alone. The step counts,
    which are the whole parameter's, are set to those of a new one."""
    parameter, optimizer = stepped(STARTS[name], (RANK, WIDE))
    set_size(parameter, (5, WIDE), 0)
    with torch.no_grad():
        parameter[RANK:] = numbers((3, WIDE), 30)
    resize_state(optimizer, parameter, 0)
    fresh = nn.Parameter(parameter.detach()[RANK:].clone())
    other = STARTS[name](fresh)
    state = optimizer.state[parameter]
    state["step"].zero_()
    parameter.grad = numbers((5, WIDE), 31)
    fresh.grad = parameter.grad[RANK:].clone()
    optimizer.step()
    other.step()
    torch.testing.assert_close(parameter.detach()[RANK:], fresh.detach())


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize(("factor", "shape"), [(name, shape) for name, (shape, _) in SHAPES.items()])
def test_old_rows_keep_their_state_bit_for_bit(name, factor, shape):
    dim = SHAPES[factor][1]
    parameter, optimizer = stepped(STARTS[name], shape(RANK))
    before = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    set_size(parameter, shape(5), dim)
    resize_state(optimizer, parameter, dim)
    for key, value in optimizer.state[parameter].items():
        old = value if value.dim() == 0 else value.narrow(dim, 0, RANK)
        assert torch.equal(old, before[key]), key


@pytest.mark.parametrize("name", STARTS)
def test_a_state_in_bfloat16_stays_in_it(name):
    parameter, optimizer = stepped(STARTS[name], (RANK, WIDE))
    state = optimizer.state[parameter]
    state.update({key: value.bfloat16() for key, value in state.items() if value.dim() == 2})
    set_size(parameter, (5, WIDE), 0)
    resize_state(optimizer, parameter, 0)
    assert {value.dtype for value in optimizer.state[parameter].values() if value.dim()} == {torch.bfloat16}


def test_copies_of_weights_follow_the_scale_of_their_parameter():
    parameter, optimizer = stepped(STARTS["ASGD"], (RANK, 1))
    before = optimizer.state[parameter]["ax"].clone()
    set_size(parameter, (5, 1), 0)
    resize_state(optimizer, parameter, 0, rescaled=0.5)
    assert torch.equal(optimizer.state[parameter]["ax"][:RANK], before * 0.5)


def test_numbers_that_are_no_weights_do_not_follow_it():
    parameter, optimizer = stepped(STARTS["AdamW"], (RANK, 1))
    before = optimizer.state[parameter]["exp_avg"].clone()
    set_size(parameter, (5, 1), 0)
    resize_state(optimizer, parameter, 0, rescaled=0.5)
    assert torch.equal(optimizer.state[parameter]["exp_avg"][:RANK], before)


# What is not known is not kept.


class Further(torch.optim.AdamW):
    """Keeps one thing more than AdamW does, in the parameter's shape."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("fisher", torch.ones_like(parameter))
        return loss


class Inheriting(torch.optim.AdamW):
    pass


def test_a_key_that_is_not_known_drops_the_state():
    parameter, optimizer = stepped(lambda p: Further([p], lr=0.1), (RANK, WIDE))
    set_size(parameter, (5, WIDE), 0)
    with pytest.warns(UserWarning, match="'fisher' of Further.*how it starts is not known.*starts anew"):
        resize_state(optimizer, parameter, 0)
    assert parameter not in optimizer.state


@pytest.mark.filterwarnings("error")
def test_a_class_that_keeps_what_its_base_keeps_is_known():
    parameter, optimizer = stepped(lambda p: Inheriting([p], lr=0.1), (RANK, WIDE))
    set_size(parameter, (5, WIDE), 0)
    resize_state(optimizer, parameter, 0)
    assert optimizer.state[parameter]["exp_avg"].shape == (5, WIDE)


def test_another_class_of_a_known_name_is_not_known():
    other = type("AdamW", (torch.optim.Optimizer,), {"__module__": "elsewhere", "step": lambda *_: None})
    parameter = nn.Parameter(numbers((RANK, WIDE), 0))
    optimizer = other([parameter], {})
    optimizer.state[parameter]["exp_avg"] = torch.zeros(RANK, WIDE)
    set_size(parameter, (5, WIDE), 0)
    with pytest.warns(UserWarning, match="'exp_avg' of AdamW"):
        resize_state(optimizer, parameter, 0)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.zeros(RANK, WIDE).as_subclass(Subclass), "it is a Subclass"),
        (torch.zeros(RANK, WIDE, dtype=torch.uint8), "it is quantised"),
        (torch.zeros(RANK, WIDE).to_sparse(), "its layout is torch.sparse_coo"),
        (torch.zeros(RANK), "it has no number for each of the parameter's"),
        (torch.zeros(RANK + 1, WIDE), "its size is not that of the other keys"),
    ],
    ids=["subclass", "quantised", "sparse", "another shape", "another size"],
)
def test_a_tensor_that_is_not_plain_drops_the_state(value, told):
    parameter, optimizer = stepped(ELEMENTWISE["AdamW"], (RANK, WIDE))
    optimizer.state[parameter]["exp_avg_sq"] = value
    set_size(parameter, (5, WIDE), 0)
    with pytest.warns(UserWarning, match=f"'exp_avg_sq' of AdamW.*{told}"):
        resize_state(optimizer, parameter, 0)
    assert parameter not in optimizer.state


def test_dampened_momentum_is_not_known_to_start_at_0():
    parameter, optimizer = stepped(
        lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5), (RANK, WIDE)
    )
    set_size(parameter, (5, WIDE), 0)
    with pytest.warns(UserWarning, match="not known under these settings"):
        resize_state(optimizer, parameter, 0)


def test_state_that_an_optimizer_keeps_in_its_groups_starts_anew_with_a_warning():
    parameter, optimizer = stepped(ELEMENTWISE["SGD momentum"], (RANK, WIDE))
    kept = optimizer.param_groups[0]["state"] = {parameter: {"ema": torch.zeros(RANK, WIDE)}}
    set_size(parameter, (5, WIDE), 0)
    with pytest.warns(UserWarning, match="the state in the groups of SGD cannot follow"):
        resize_state(optimizer, parameter, 0)
    assert parameter not in kept


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [lambda p: Further([p], lr=0.1), *FACTORED.values()])
def test_state_that_is_in_step_is_not_dropped_again(make):
    parameter, optimizer = stepped(make, (RANK, WIDE))
    set_size(parameter, (5, WIDE), 0)
    quietly_resize(optimizer, parameter, 0)
    parameter.grad = numbers((5, WIDE), 20)
    optimizer.step()
    resize_state(optimizer, parameter, 0)
    assert optimizer.state[parameter]


# The net under optimizers that no scheduler looks after.


class Means(torch.optim.SGD):
    """Keeps a mean of each row, in two dimensions, as Adam-mini does."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("means", parameter.grad.mean(1, keepdim=True))
        return super().step(closure)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [lambda p: Means([p], lr=0.1), *FACTORED.values()])
def test_a_loaded_state_of_the_parameters_size_is_kept_whatever_its_form(make):
    parameter, optimizer = stepped(make, (RANK, WIDE))
    watch(parameter)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    parameter.grad = numbers((RANK, WIDE), 20)
    optimizer.step()
    assert optimizer.state[parameter]["step" if "step" in optimizer.state[parameter] else "means"] is not None


@pytest.mark.parametrize("make", [lambda p: Means([p], lr=0.1), *FACTORED.values()])
def test_a_loaded_state_of_another_size_is_dropped_whatever_its_form(make):
    _, smaller = stepped(make, (RANK, WIDE))
    parameter, optimizer = stepped(make, (5, WIDE))
    watch(parameter)
    optimizer.load_state_dict(copy.deepcopy(smaller.state_dict()))
    parameter.grad = numbers((5, WIDE), 20)
    with pytest.warns(UserWarning, match="changed its rank without the optimizer"):
        optimizer.step()


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
