"""DoRA: against the paper's formula with the weight built, and PEFT's layers with the same numbers."""

import copy

import pytest
import torch
from growing import growing
from increlora_rs import RESERVE_E, IncreLoraConfig
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

TARGETS = ["words", "image", "first", "second"]
ALPHA, BUDGET = 6.0, 3


class Every(nn.Module):
    """A layer of each kind, with a bias and without."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.image = nn.Conv1d(8, 6, 3, padding=1)
        self.first = nn.Linear(6, 10)
        self.second = Conv1D(7, 10)
        self.head = nn.Linear(7, 4, bias=False)

    def forward(self, ids):
        x = torch.tanh(self.image(self.words(ids).transpose(1, 2)))
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x.transpose(1, 2))))))


IDS = torch.tensor([[3, 0, 7, 3, 10], [1, 2, 0, 9, 9]])


def every(dtype=torch.float64):
    torch.manual_seed(7)
    model = Every().to(dtype)
    with torch.no_grad():
        model.second.bias.normal_()
    return model


def config_of(**settings):
    return growing(
        **{"r": BUDGET, "lora_alpha": ALPHA, "target_modules": TARGETS, "use_dora": True} | settings
    )


def moved(model, seed=3, adapter="default"):
    """The model, whose adapter has any numbers; some of them large beside the weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model, adapter).values():
            for factor in layer.factors(adapter):
                factor.normal_(0.0, 0.4, generator=generator)
            magnitude = layer.magnitude(adapter).weight
            magnitude.mul_(torch.rand(magnitude.shape, generator=generator).to(magnitude) + 0.5)
    return model


@pytest.fixture
def build(grow):
    """``build()``: the model with an adapter of unequal ranks that is not at its start."""

    def run(base=None, **settings):
        reserve = settings.pop("reserve", 0)
        model = get_peft_model(every() if base is None else base, config_of(**settings))
        grow(model, {"words": 2, "image": 4, "first": 3, "second": 1}, reserve=reserve)
        return moved(model)

    return run


def matrix(layer, weight):
    base = layer.get_base_layer()
    return weight.t() if isinstance(base, (nn.Embedding, Conv1D)) else weight.flatten(1)


def direction(layer, weight, adapter="default", rows=None):
    """W + s B diag(E) A, (out, in), with E of the reserve where ``rows`` counts it in."""
    a, b, e = layer.factors(adapter)
    rows = e.shape[0] if rows is None else rows
    e = torch.cat([e.view(-1), e.new_full((rows - e.shape[0],), RESERVE_E)])
    return weight + ALPHA / BUDGET * b[:, :rows] @ torch.diag(e) @ a[:rows]


def decomposed(layer, weight, adapter="default", rows=None, frozen=None):
    """m V / ||V||, V the direction from ``weight`` and the norm that from ``frozen``, without a gradient."""
    norms = direction(layer, weight if frozen is None else frozen, adapter, rows).detach().norm(dim=1)
    scaled = direction(layer, weight, adapter, rows) / norms.unsqueeze(1)
    return layer.magnitude(adapter).weight.unsqueeze(1) * scaled


def dense(model, adapters=("default",), rows=None):
    """The base model's weights with the adapters in them, one after the other; gradients pass."""
    weights = {}
    for name, layer in layers_of(model).items():
        base = layer.get_base_layer().weight.detach()
        changed = frozen = matrix(layer, base)
        for adapter in adapters:
            changed = decomposed(layer, changed, adapter, rows and rows[name], frozen)
        own = isinstance(layer.get_base_layer(), (nn.Embedding, Conv1D))
        weights[f"{name}.weight"] = (changed.t() if own else changed).reshape(base.shape)
    return weights


def layers_of(model):
    return {short(name): layer for name, layer in adapted_layers(model, "default").items()}


def reference(model, **kwargs):
    return functional_call(every(), dense(model, **kwargs), (IDS,))


def near(found, wanted, tolerance=1e-12):
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=tolerance)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# Forward and backward.


def test_a_fresh_adapter_gives_the_base_models_outputs():
    model = get_peft_model(every(), config_of())
    assert torch.equal(model(IDS), every()(IDS))


def test_a_fresh_adapter_on_a_bfloat16_base_gives_its_outputs():
    model = get_peft_model(every(torch.bfloat16), config_of())
    wanted = every(torch.bfloat16)(IDS)
    assert (model(IDS) - wanted).norm() < torch.finfo(torch.bfloat16).eps * wanted.norm()
    for layer in layers_of(model).values():
        magnitude = layer.magnitude("default").weight
        assert magnitude.dtype == torch.float32
        norms = layer.as_matrix(layer.get_base_layer().weight).double().norm(dim=1)
        assert torch.allclose(magnitude.double(), norms, rtol=1e-6, atol=0.0)


def test_a_fresh_adapter_of_random_factors_has_the_update_in_its_magnitudes():
    model = get_peft_model(every(), config_of(init_lora_weights=False))
    weights = {}
    for name, layer in layers_of(model).items():
        base = layer.get_base_layer().weight.detach()
        weights[f"{name}.weight"] = base + layer.get_delta_weight("default")
    near(model(IDS), functional_call(every(), weights, (IDS,)))


@pytest.mark.parametrize("training", [False, True])
def test_output_is_that_of_the_normed_weight(build, training):
    model = build().train(training)
    near(model(IDS), reference(model))


def test_gradients_are_those_of_the_normed_weight(build):
    model = build()
    names = trained(model)
    found = torch.autograd.grad(model(IDS).pow(3).sum(), list(names.values()))
    wanted = torch.autograd.grad(reference(model).pow(3).sum(), list(names.values()))
    assert sum("lora_magnitude_vector" in name for name in names) == 4
    for one, other in zip(found, wanted, strict=True):
        near(one, other, 1e-10 * max(1.0, float(other.abs().max())))


def test_the_gradient_of_the_input_is_that_of_the_normed_weight(build):
    layer = layers_of(build())["first"]
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = decomposed(layer, layer.get_base_layer().weight.detach())
    wanted = functional.linear(x, weight, layer.get_base_layer().bias)
    near(layer(x), wanted)
    (one,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
    (other,) = torch.autograd.grad(wanted.pow(3).sum(), x)
    near(one, other, 1e-11)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (3, 6), (2, 2, 3, 6)])
def test_any_leading_shape_is_taken(build, shape):
    layer = layers_of(build())["first"]
    x = torch.randn(shape, dtype=torch.float64)
    weight = decomposed(layer, layer.get_base_layer().weight.detach())
    y = layer(x)
    near(y, functional.linear(x, weight, layer.get_base_layer().bias))
    (gradient,) = torch.autograd.grad(y.sum(), layer.magnitude("default").weight)
    assert gradient.shape == (10,)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("training", [False, True])
def test_the_reserve_counts_in_training_only(build, training):
    model = build(reserve=2, init_lora_weights="svd", advance_learning=True).train(training)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.lora_A["default"].weight[layer.r["default"] :] *= 1e4
    rows = {name: layer.r["default"] + 2 * training for name, layer in layers_of(model).items()}
    near(model(IDS), reference(model, rows=rows))


def test_without_components_the_magnitude_acts_and_learns():
    model = get_peft_model(every(), config_of(init_r=0))
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.magnitude("default").weight.mul_(1.5)
    names = {name: p for name, p in trained(model).items() if "magnitude" in name}
    near(model(IDS), reference(model))
    found = torch.autograd.grad(model(IDS).pow(3).sum(), list(names.values()))
    wanted = torch.autograd.grad(reference(model).pow(3).sum(), list(names.values()))
    for one, other in zip(found, wanted, strict=True):
        near(one, other, 1e-10)


def test_a_row_of_zeros_stays_finite_and_learns():
    base = every()
    with torch.no_grad():
        base.first.weight[2] = 0.0
    model = get_peft_model(base, config_of(target_modules=["first"]))
    layer = layers_of(model)["first"]
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    for _ in range(3):
        model(IDS).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() for p in trained(model).values())
    assert layer.lora_B["default"].weight[2].abs().max() > 0.0
    assert layer.magnitude("default").weight[2] != 0.0


def test_dropout_is_before_the_factors_alone():
    torch.manual_seed(1)
    base = nn.ModuleDict({"only": nn.Linear(6, 10)}).double()
    model = get_peft_model(base, config_of(target_modules=["only"], init_r=3, lora_dropout=0.5))
    layer = layers_of(moved(model))["only"].train()
    x = torch.randn(4, 6, dtype=torch.float64)
    a, b, e = (factor.detach() for factor in layer.factors("default"))
    with torch.no_grad():
        # What was dropped is read off the update: A is a unit matrix, by which every input has a share.
        layer.lora_A["default"].weight.copy_(torch.eye(3, 6))
        torch.manual_seed(4)
        y = layer(x)
        frozen, bias = layer.get_base_layer().weight, layer.get_base_layer().bias
        gain = layer.magnitude("default").weight / direction(layer, frozen).norm(dim=1)
        update = ((y - bias) / gain - x @ frozen.t()) @ torch.linalg.pinv((b * e.view(-1) * 2.0).t())
    kept = (update / x[:, :3]).round(decimals=9)
    assert set(kept.flatten().tolist()) == {0.0, 2.0}
    assert a.shape == (3, 6)


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_the_same_but_for_its_rounding(build, dtype):
    model = build(every(torch.float32))
    wanted = functional_call(every(torch.float32), dense(model), (IDS,))
    with torch.autocast("cpu", dtype):
        y = model(IDS)
        y.float().square().sum().backward()
    assert (y.float() - wanted).norm() < 16 * torch.finfo(dtype).eps * wanted.norm()
    assert all(p.grad.dtype == torch.float32 for p in trained(model).values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_without_autocast_the_magnitudes_have_the_dtype_of_the_base(tmp_path, low_cpu_mem_usage):
    made = get_peft_model(every(torch.bfloat16), config_of(), autocast_adapter_dtype=False)
    assert {p.dtype for p in trained(made).values()} == {torch.bfloat16}
    made.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        every(torch.bfloat16),
        tmp_path,
        is_trainable=True,
        autocast_adapter_dtype=False,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert {p.dtype for p in trained(loaded).values()} == {torch.bfloat16}
    made(IDS).float().square().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in trained(made).values() if p.grad is not None)


def test_loaded_magnitudes_are_not_those_of_the_base(tmp_path):
    made = get_peft_model(every(torch.bfloat16), config_of())
    with torch.no_grad():
        for layer in layers_of(made).values():
            layer.magnitude("default").weight.mul_(1.5)
    made.save_pretrained(tmp_path)
    loaded = layers_of(PeftModel.from_pretrained(every(torch.bfloat16), tmp_path))
    for name, layer in layers_of(made).items():
        wanted = layer.magnitude("default").weight
        assert torch.equal(loaded[name].magnitude("default").weight, wanted)


def test_a_cast_model_has_cast_magnitudes(build):
    model = build().to(torch.bfloat16)
    assert {p.dtype for p in trained(model).values()} == {torch.bfloat16}


# PEFT's own.


def peft_dora(model, base, **settings):
    """PEFT's layers with the numbers of ``model``, in which the scale is in B."""
    ranks = {f"^{name}": layer.r["default"] for name, layer in layers_of(model).items()}
    other = get_peft_model(
        base,
        LoraConfig(
            r=8, target_modules=TARGETS, use_dora=True, rank_pattern=ranks, alpha_pattern=ranks, **settings
        ),
    )
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            twin = other.base_model.model.get_submodule(name)
            a, b, e = layer.factors("default")
            b = b * e.view(-1) * layer.scaling["default"]
            if isinstance(layer.get_base_layer(), nn.Embedding):
                own = twin.lora_embedding_A["default"], twin.lora_embedding_B["default"]
            else:
                own = twin.lora_A["default"].weight, twin.lora_B["default"].weight
            magnitude = twin.lora_magnitude_vector["default"].weight
            values = a, b, layer.magnitude("default").weight
            for parameter, value in zip((*own, magnitude), values, strict=True):
                parameter.copy_(value.reshape(parameter.shape))
    return other


def test_peft_computes_the_same(build):
    model = build()
    other = peft_dora(model, every())
    near(model(IDS), other(IDS))
    for one in (model, other):
        one(IDS).pow(3).sum().backward()
    for name, layer in layers_of(model).items():
        magnitude = other.base_model.model.get_submodule(name).lora_magnitude_vector["default"].weight
        near(layer.magnitude("default").weight.grad, magnitude.grad.flatten(), 1e-10)


# Merging, several adapters.


@pytest.mark.parametrize("safe", [False, True])
def test_a_merged_model_gives_the_same_outputs_and_comes_back(build, safe):
    model = build().eval()
    before = model(IDS)
    model.merge_adapter(safe_merge=safe)
    near(model(IDS), before)
    model.unmerge_adapter()
    near(model(IDS), before)
    for name, layer in layers_of(model).items():
        near(layer.get_base_layer().weight, every().get_submodule(name).weight)


def test_a_model_with_the_adapter_in_its_weights_needs_no_library(build):
    model = build().eval()
    wanted = model(IDS)
    merged = model.merge_and_unload()
    assert type(merged.first) is nn.Linear
    near(merged(IDS), wanted)


def test_a_magnitude_of_zero_can_be_unmerged(build):
    model = build().eval()
    layer = layers_of(model)["first"]
    with torch.no_grad():
        layer.magnitude("default").weight[4] = 0.0
    before = layer.get_base_layer().weight.clone()
    model.merge_adapter()
    assert layer.get_base_layer().weight[4].abs().max() == 0.0
    model.unmerge_adapter()
    near(layer.get_base_layer().weight, before)


def test_a_module_without_components_merges_its_magnitude():
    model = get_peft_model(every(), config_of(init_r=0)).eval()
    with torch.no_grad():
        layers_of(model)["first"].magnitude("default").weight.mul_(1.5)
    before = model(IDS)
    model.merge_adapter()
    near(model(IDS), before)
    near(layers_of(model)["first"].get_base_layer().weight, 1.5 * every().first.weight)


@pytest.fixture
def pair(build, grow):
    """A model with two adapters that both act."""
    model = build().eval()
    model.add_adapter("other", config_of())
    grow(model, adapter_name="other", seed=9)
    moved(model, seed=11, adapter="other")
    model.base_model.set_adapter(["default", "other"])
    return model


def test_active_adapters_act_one_after_the_other(pair):
    near(pair(IDS), reference(pair, adapters=("default", "other")))


def test_merged_adapters_act_one_after_the_other(pair):
    before = pair(IDS)
    pair.merge_adapter()
    near(pair(IDS), before)
    pair.unmerge_adapter()
    near(pair(IDS), before)


def test_an_adapter_that_is_merged_later_has_the_norm_of_the_base(pair):
    before = pair(IDS)
    pair.merge_adapter(adapter_names=["default"])
    pair.merge_adapter(adapter_names=["other"])
    near(pair(IDS), before)


def test_an_adapter_without_magnitudes_acts_beside_one_that_has_them(build, grow):
    model = build().eval()
    model.add_adapter("plain", config_of(use_dora=False))
    grow(model, adapter_name="plain", seed=9)
    plain = {name: layer.get_delta_weight("plain") for name, layer in layers_of(model).items()}
    model.base_model.set_adapter(["default", "plain"])
    weights = dense(model)
    for name, layer in layers_of(model).items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + plain[name]
        assert layer.magnitude("plain") is None
    near(model(IDS), functional_call(every(), weights, (IDS,)))
    before = model(IDS)
    model.merge_adapter()
    near(model(IDS), before)


def test_a_batch_of_several_adapters_has_each_ones_magnitudes(pair):
    pair.base_model.set_adapter("default")
    first = pair(IDS)[:1]
    pair.base_model.set_adapter("other")
    second = pair(IDS)[1:]
    near(pair(IDS, adapter_names=["default", "other"]), torch.cat([first, second]))


def test_a_disabled_adapter_leaves_the_base(build):
    model = build()
    with model.disable_adapter():
        near(model(IDS), every()(IDS))


def test_a_deleted_adapter_takes_its_magnitudes_along(pair):
    pair.delete_adapter("other")
    near(pair(IDS), reference(pair))
    assert not any(".other" in name for name in pair.state_dict())


def test_a_second_adapter_is_not_begun_on_a_merged_weight(build):
    model = build().eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"use_dora=True.*'other'.*\['default'\].*unmerge_adapter"):
        model.add_adapter("other", config_of())


# What is kept of the weight.


def test_the_norms_follow_a_base_weight_that_is_loaded_anew(build):
    model = build().eval()
    model(IDS)
    layer = layers_of(model)["first"]
    other = {"weight": 2.0 * layer.get_base_layer().weight.detach(), "bias": layer.get_base_layer().bias}
    layer.get_base_layer().load_state_dict(other)
    x = torch.randn(3, 6, dtype=torch.float64)
    near(layer(x), functional.linear(x, decomposed(layer, other["weight"]), other["bias"]))


def test_a_copy_of_the_model_is_its_own(build):
    model = build().eval()
    wanted = model(IDS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers_of(twin).values():
            layer.magnitude("default").weight.mul_(2.0)
    near(model(IDS), wanted, 0.0)
    assert (twin(IDS) - wanted).abs().max() > 0.01


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_has_the_same_gradients(build, reentrant):
    layer = layers_of(build(lora_dropout=0.3).train())["first"]
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(2)
        run(x).pow(3).sum().backward()
        found.append([p.grad for p in (x, *trained(layer).values())])
        layer.zero_grad()
        x.grad = None
    assert len(found[0]) == 5
    for one, other in zip(*found, strict=True):
        near(one, other)


# Who has it.


def test_the_papers_form_takes_it():
    config = IncreLoraConfig.paper(target_modules=TARGETS, use_dora=True)
    model = get_peft_model(every(), config)
    near(model(IDS), every()(IDS))


@pytest.mark.parametrize("value", ["yes", 2, None])
def test_another_value_is_refused_by_name(value):
    with pytest.raises((ValueError, TypeError), match="use_dora="):
        config_of(use_dora=value)


def test_a_weighted_sum_is_refused_by_name(pair):
    with pytest.raises(ValueError, match="'default' has use_dora=True"):
        pair.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
