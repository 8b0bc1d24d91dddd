"""What others do to the parameters during a training: values of other ranks are taken, parameters that the
optimizer does not hold stop it."""

import copy
import warnings

import pytest
import torch
from growing import growing
from increlora_rs import attach
from increlora_rs.layers.found import adapted_layers
from increlora_rs.training.modules import adapted_modules
from peft import get_peft_model

STEPS = 30


@pytest.fixture
def training(make_plain):
    """A model of rank 1, its optimizer and the scheduler that is attached to both."""
    config = growing(r=3, lora_alpha=6, target_modules=["lin0", "lin1"], growth_end=0.6)
    model = get_peft_model(make_plain(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimizer, attach(model, optimizer, total_steps=STEPS)


def train(model, optimizer, x, steps):
    for _ in range(steps):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assign(model, values):
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.data = value.clone()


def test_assigned_values_of_a_larger_rank_are_trained_on(training, grow, plain_input):
    model, optimizer, scheduler = training
    larger = copy.deepcopy(model)
    grow(larger, {"lin0": 2, "lin1": 3})
    train(model, optimizer, plain_input, 1)
    assign(model, [p.data for p in larger.parameters()])
    with pytest.warns(UserWarning, match="changed its rank without the optimizer"):
        train(model, optimizer, plain_input, 1)
    train(model, optimizer, plain_input, STEPS - 2)
    assert scheduler.total_rank == scheduler.budget
    assert not torch.equal(model(plain_input), larger(plain_input))


def test_values_of_an_earlier_smaller_rank_grow_to_the_budget_again(training, plain_input):
    model, optimizer, scheduler = training
    early = [p.data.clone() for p in model.parameters()]
    train(model, optimizer, plain_input, 10)
    assert scheduler.total_rank > 2
    assign(model, early)
    with pytest.warns(UserWarning, match="changed its rank without the optimizer"):
        train(model, optimizer, plain_input, 1)
    train(model, optimizer, plain_input, STEPS - 11)
    assert scheduler.total_rank == scheduler.budget


def test_assigned_values_of_another_rank_are_told_of_as_a_load(training, grow, plain_input):
    model, optimizer, scheduler = training
    larger = copy.deepcopy(model)
    grow(larger, {"lin0": 2})
    events = []
    scheduler.on_growth(events.append)
    assign(model, [p.data for p in larger.parameters()])
    train(model, optimizer, plain_input, 1)
    assert [(event.cause, len(event.resizes)) for event in events] == [("load", 3)]


def to_meta_and_back(model):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu").load_state_dict(values)


REPLACED = {
    "load_state_dict(assign=True)": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    "to('meta')": to_meta_and_back,
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_parameters_that_the_optimizer_does_not_hold_stop_the_next_step(training, plain_input, replace):
    model, optimizer, _ = training
    train(model, optimizer, plain_input, 1)
    replace(model)
    with pytest.raises(ValueError, match=r"'lin0' are no longer those that the optimizer trains.*attach"):
        train(model, optimizer, plain_input, 1)


def test_a_replaced_parameter_that_the_optimizer_holds_is_trained_to_the_budget(training, plain_input):
    model, optimizer, scheduler = training
    layer = adapted_layers(model, "default")["base_model.model.lin1"]
    old = layer.factors("default")[1]
    new = torch.nn.Parameter(old.detach().clone())
    layer.lora_B["default"].weight = new
    params = optimizer.param_groups[0]["params"]
    params[[id(p) for p in params].index(id(old))] = new
    train(model, optimizer, plain_input, STEPS)
    assert scheduler.total_rank == scheduler.budget
    assert new.abs().sum() > 0.0


def test_moving_to_another_dtype_is_no_other_parameter(training, plain_input):
    model, optimizer, scheduler = training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model.double(), optimizer, plain_input.double(), STEPS)
    assert scheduler.total_rank == scheduler.budget


def test_fused_adamw_without_a_scheduler_never_steps_with_state_of_another_size(
    make_plain, grow, plain_input
):
    config = growing(r=3, lora_alpha=6, target_modules=["lin0", "lin1"])
    model = get_peft_model(make_plain(), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
    attach(model, optimizer, total_steps=STEPS).detach()
    larger = copy.deepcopy(model)
    grow(larger, {"lin0": 3, "lin1": 3})
    train(model, optimizer, plain_input, 2)
    assign(model, [p.data for p in larger.parameters()])
    with pytest.warns(UserWarning, match="changed its rank without the optimizer"):
        train(model, optimizer, plain_input, 1)
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in parameters)


def test_a_factor_that_is_computed_is_refused(make_plain):
    model = get_peft_model(make_plain(), growing(r=2, target_modules=["lin0", "lin1"]))
    torch.nn.utils.parametrizations.weight_norm(adapted_modules(model, "default")[0].layer.lora_B["default"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"lora_B of 'lin0' is computed.*take that off"):
        attach(model, optimizer, total_steps=STEPS)


def test_a_factor_that_two_modules_share_is_refused(make_plain):
    model = get_peft_model(make_plain(), growing(r=2, target_modules=["lin0", "lin1"]))
    first, second = (module.layer for module in adapted_modules(model, "default"))
    second.lora_E["default"].weight = first.lora_E["default"].weight
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"'lin0' and 'lin1' share one parameter, lora_E.*of its own"):
        attach(model, optimizer, total_steps=STEPS)
