"""What a callback of `on_growth` is told, and when."""

import copy

import peft
import pytest
import torch
from growing import growing
from increlora_rs import attach
from torch import nn

STEPS = 12


def adapted(**config):
    torch.manual_seed(3)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["0", "2"], "tinit": 3, "deltaT": 2, "top_h": 1}
    base = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 7))
    return peft.get_peft_model(base, growing(**(settings | config)))


def begin(**config):
    model = adapted(**config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    return model, optimizer, attach(model, optimizer, total_steps=STEPS)


def train(model, optimizer, first, last):
    for number in range(first, last + 1):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(number))
        (model(x) - x[:, :7].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def test_an_event_has_every_parameter_that_changed_by_its_name_with_its_sizes():
    model, optimizer, scheduler = begin()
    events, before = [], shapes(model)
    scheduler.on_growth(events.append)
    train(model, optimizer, 1, 4)
    after, parameters = shapes(model), dict(model.named_parameters())
    (event,) = events
    assert (event.step, event.cause) == (4, "growth")
    assert {resize.name for resize in event.resizes} == {
        name for name in after if after[name] != before[name]
    }
    for resize in event.resizes:
        assert resize.parameter is parameters[resize.name]
        assert resize.old_size == before[resize.name][resize.dim] == 1
        assert resize.new_size == after[resize.name][resize.dim] == 2
        assert (resize.added, list(resize.removed)) == (range(1, 2), [])


@pytest.mark.parametrize("preserve_output", [True, False])
def test_an_event_has_the_factor_by_which_old_rows_of_e_were_rescaled(preserve_output):
    model, optimizer, scheduler = begin(scaling="rank", preserve_output=preserve_output)
    events = []
    scheduler.on_growth(events.append)
    train(model, optimizer, 1, 4)
    factors = {name: [r.factor for r in events[0].resizes if name in r.name] for name in ("_A", "_B", "_E")}
    assert factors == {"_A": [1.0], "_B": [1.0], "_E": [2.0 if preserve_output else 1.0]}


def test_there_is_an_event_for_each_growth_and_none_else():
    model, optimizer, scheduler = begin()
    steps = []
    scheduler.on_growth(lambda event: steps.append(event.step))
    train(model, optimizer, 1, STEPS)
    scheduler.detach()
    assert steps == sorted(set(scheduler.history["step"].tolist()))


def test_optimizer_state_has_followed_when_a_callback_is_called():
    model, optimizer, scheduler = begin()
    checked = []

    def check(event):
        for resize in event.resizes:
            state = optimizer.state[resize.parameter]
            checked.append(state["exp_avg"].shape == resize.parameter.shape)

    scheduler.on_growth(check)
    train(model, optimizer, 1, STEPS)
    assert checked and all(checked)


def test_components_in_reserve_come_and_go_with_an_event():
    model, optimizer, scheduler = begin(
        init_lora_weights="svd", advance_learning=True, scaling="rank", importance="sensitivity"
    )
    events = []
    scheduler.on_growth(events.append)
    train(model, optimizer, 1, 5)
    scheduler.detach()
    assert [event.cause for event in events] == ["growth", "detach"]
    assert all(list(resize.removed) and not list(resize.added) for resize in events[-1].resizes)


@pytest.mark.filterwarnings("ignore:the state .* of AdamW has shape")
def test_an_adapter_of_other_ranks_is_told_of_before_the_next_step():
    model, optimizer, scheduler = begin()
    first = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1, 4)
    events = []
    scheduler.on_growth(events.append)
    model.load_state_dict(first)
    train(model, optimizer, 5, 5)
    assert [(event.cause, event.step) for event in events] == [("load", 4)]
    assert {(resize.old_size, resize.new_size) for resize in events[0].resizes} == {(2, 1)}


def test_a_resumed_state_of_other_ranks_is_told_of_before_the_next_step():
    model, optimizer, _ = begin()
    train(model, optimizer, 1, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer, scheduler = begin()
    events = []
    scheduler.on_growth(events.append)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, 5, 5)
    assert [(event.cause, event.step) for event in events] == [("load", 4)]


def test_a_callback_is_called_until_its_handle_is_removed_even_by_itself():
    model, optimizer, scheduler = begin()
    steps = []

    def once(event):
        steps.append(event.step)
        handle.remove()

    handle = scheduler.on_growth(once)
    scheduler.on_growth(lambda event: steps.append(-event.step))
    train(model, optimizer, 1, 6)
    assert steps == [4, -4, -6]


def test_what_a_callback_raises_comes_out_of_the_step_and_the_training_can_go_on():
    model, optimizer, scheduler = begin()

    def fail(event):
        raise KeyError("mine")

    handle = scheduler.on_growth(fail)
    with pytest.raises(KeyError, match="mine"):
        train(model, optimizer, 1, 4)
    handle.remove()
    optimizer.zero_grad()
    train(model, optimizer, 5, STEPS)
    other = begin()
    train(other[0], other[1], 1, STEPS)
    for mine, theirs in zip(model.parameters(), other[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="callback=3 cannot be called"):
        begin()[2].on_growth(3)


def test_a_copy_of_what_keeps_the_scheduler_keeps_the_same():
    _, _, scheduler = begin()
    assert copy.deepcopy({"growth": scheduler})["growth"] is scheduler
