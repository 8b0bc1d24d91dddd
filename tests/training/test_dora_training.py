"""Adapters with DoRA's magnitudes in training: growth and moves, gauges, resume, checkpoints."""

import io

import peft
import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, attach
from increlora_rs.layers.found import adapted_layers
from increlora_rs.methods import METHODS
from increlora_rs.training.fit import schedulers_of
from method_cases import adapted, assert_equal_bits, optimizer_of, ready, run, trainable
from torch import nn

STEPS, STOP = 12, 5
DORA = [method for method in METHODS if "use_dora" in method.config.supported]
every_dora = pytest.mark.parametrize("method", DORA, ids=lambda method: method.name)


def test_the_methods_with_components_or_two_factors_take_it():
    assert {method.name for method in DORA} == {"increlora", "adalora_rs", "sora", "prilora"}


def two_layers(**settings):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 6)).double()
    config = {"r": 3, "init_r": 3, "lora_alpha": 6, "target_modules": ["0", "2"], "use_dora": True}
    return peft.get_peft_model(model, growing(**(config | settings))).double()


def layers_of(model):
    return list(adapted_layers(model, "default").values())


def part(step):
    x = torch.randn(8, 9, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, torch.sin(2.0 * x[:, :6])


def train(model, steps, optimizer):
    for step in steps:
        x, y = part(step)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("scaling", ["budget", "rank"])
def test_a_growth_leaves_outputs_and_magnitudes_as_they_are(scaling):
    model = two_layers(scaling=scaling)
    train(model, range(4), optimizer_of(model))
    x, _ = part(99)
    before, magnitudes = model(x), [layer.magnitude("default").weight.clone() for layer in layers_of(model)]
    for layer in layers_of(model):
        layer.structure.grow(layer, "default", 2, torch.Generator().manual_seed(1))
    assert [layer.r["default"] for layer in layers_of(model)] == [5, 5]
    torch.testing.assert_close(model(x), before, rtol=0.0, atol=1e-12)
    for layer, magnitude in zip(layers_of(model), magnitudes, strict=True):
        assert torch.equal(layer.magnitude("default").weight, magnitude)


def test_a_component_that_leaves_takes_its_share_of_the_direction_alone():
    model = two_layers()
    train(model, range(4), optimizer_of(model))
    layer = layers_of(model)[0]
    a, b, e = (factor.detach()[..., :] for factor in layer.factors("default"))
    magnitude = layer.magnitude("default").weight.detach().clone()
    rest = layer.get_base_layer().weight + 2.0 * b[:, [0, 2]] @ torch.diag(e[[0, 2], 0]) @ a[[0, 2]]
    layer.structure.shrink(layer, "default", [0, 2])
    x, _ = part(99)
    weight = magnitude.unsqueeze(1) * rest / rest.norm(dim=1, keepdim=True)
    wanted = nn.functional.linear(x, weight, layer.get_base_layer().bias)
    torch.testing.assert_close(layer(x), wanted, rtol=0.0, atol=1e-12)


def shown(importance, factor):
    """What a backward pass adds to the gauge, with magnitudes ``factor`` times the norms; and the layer, the
    gradient of its output and its input."""
    model = two_layers(importance=importance, tinit=2, init_r=1, target_modules=["2"])
    (layer,) = layers_of(model)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(5)).mul_(0.1)
        layer.magnitude("default").weight.mul_(factor)
    attach(model, optimizer_of(model), total_steps=40)
    layer.probes["default"].arm(True)
    seen, (x, _) = [], part(0)
    layer.register_forward_hook(lambda _, inputs, y: seen.append((inputs[0], y)))
    y = model(x)
    gradient = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).expand_as(y)
    y.backward(gradient)
    return layer.probes["default"].gauge.total.clone(), layer, gradient, seen[0][0].detach()


def test_the_sensitivity_is_by_the_gradient_of_the_direction():
    total, layer, gradient, x = shown("sensitivity", 1.5)
    a, b, e = (factor.detach() for factor in layer.factors("default"))
    update = 2.0 * b @ torch.diag(e.view(-1)) @ a
    norms = (layer.get_base_layer().weight + update).norm(dim=1)
    gain = layer.magnitude("default").weight.detach() / norms
    wanted = (update * ((gradient * gain).t() @ x)).abs().sum()
    torch.testing.assert_close(total.sum(), wanted.to(total.dtype), rtol=1e-5, atol=0.0)


def test_the_sketch_is_of_the_gradient_of_the_direction():
    once, twice = (shown("gradient", factor)[0] for factor in (1.0, 2.0))
    assert once.abs().max() > 0.0
    torch.testing.assert_close(twice, 2.0 * once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("importance", ["fluctuation", "gradient", "sensitivity"])
def test_ranks_change_within_the_budget_of_components_alone(importance):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 6))
    config = IncreLoraConfig(
        r=3, lora_alpha=6, target_modules=["0", "2"], use_dora=True, importance=importance
    )
    model = peft.get_peft_model(model, config).double()
    optimizer = optimizer_of(model)
    scheduler = attach(model, optimizer, total_steps=40)
    first = [layer.magnitude("default").weight.clone() for layer in layers_of(model)]
    train(model, range(40), optimizer)
    # 3 components in each module, of in + out + 1 numbers: magnitudes are not counted.
    budget = 3 * (24 + 21) if config.unit == "parameters" else 6
    assert scheduler.budget == budget
    for layer, magnitude in zip(layers_of(model), first, strict=True):
        assert (layer.magnitude("default").weight - magnitude).abs().max() > 1e-3


@every_dora
def test_a_training_goes_on_bit_for_bit(method, make_bert, tmp_path):
    whole, model = (ready(method, make_bert(), use_dora=True) for _ in range(2))
    for each, steps in ((whole, STEPS), (model, STOP)):
        torch.manual_seed(12)
        optimizer = optimizer_of(each)
        attach(each, optimizer, total_steps=STEPS)
        run(each, optimizer, range(steps))
    model.save_pretrained(tmp_path)
    state = through_a_file(optimizer.state_dict())
    resumed = peft.PeftModel.from_pretrained(make_bert(), tmp_path, is_trainable=True).train()
    torch.manual_seed(99)
    again = optimizer_of(resumed)
    attach(resumed, again, total_steps=STEPS)
    again.load_state_dict(state)
    run(resumed, again, range(STOP, STEPS))
    assert_equal_bits(trainable(resumed), trainable(whole))
    assert any("lora_magnitude_vector" in name for name in trainable(whole))


@every_dora
def test_a_trained_adapter_merges_to_the_same_outputs(method, make_bert, tokens):
    model = ready(method, make_bert(), use_dora=True)
    optimizer = optimizer_of(model)
    attach(model, optimizer, total_steps=STEPS)
    run(model, optimizer, range(STEPS))
    schedulers_of(model)[0].detach()
    model.eval()
    wanted = model(tokens).logits
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, wanted, rtol=0.0, atol=1e-5)


def test_the_state_dict_of_another_rank_is_taken_with_its_magnitudes(make_bert, grow):
    model, other = (adapted(DORA[0], make_bert(), use_dora=True) for _ in range(2))
    grow(model)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.magnitude("default").weight.mul_(1.25)
    other.load_state_dict(model.state_dict())
    assert_equal_bits(trainable(other), trainable(model))
