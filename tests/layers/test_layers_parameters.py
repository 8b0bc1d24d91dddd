"""Adapted parameters: what comes out and its gradients, held against weights with dW in them; merging."""

import copy
import warnings

import mixtures
import pytest
import torch
from adapted_experts import MORE_TARGETS, TARGETS, adapted, layers_of, tokens_of
from growing import growing
from increlora_rs.layers.parameters import AdaptedParameters
from increlora_rs.ops.stacked import add_stacked
from increlora_rs.ops.update import LowRank
from peft import get_peft_model
from torch import nn

every_model = pytest.mark.parametrize("name", TARGETS)
more_models = pytest.mark.parametrize("name", MORE_TARGETS)


def updates_of(ranks, out=6, features=5, reserve=0):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [
        LowRank(normal(rank + reserve, features), normal(out, rank + reserve), normal(rank, 1), 0.5 + k)
        for k, rank in enumerate(ranks)
    ]


def dense(update, reserve_e=1e-5):
    rows, active = len(update.a), len(update.e)
    e = torch.cat([update.e.view(-1), torch.full((rows - active,), reserve_e, dtype=update.e.dtype)])
    return update.scale * update.b @ torch.diag(e) @ update.a


@pytest.mark.parametrize("reserve", [0, 1])
@pytest.mark.parametrize("same_scale", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2), (0, 2, 0), (0, 0, 0)], ids=str)
def test_stacked_updates_are_those_of_each_matrix(ranks, transposed, same_scale, reserve):
    updates = updates_of(ranks, reserve=reserve)
    for update in updates if same_scale else ():
        update.scale = 2.0
    weight = torch.randn(3, 5, 6, dtype=torch.float64) if transposed else torch.randn(3, 6, 5).double()
    each = [dense(update).t() if transposed else dense(update) for update in updates]
    wanted = weight + torch.stack(each)
    found = add_stacked(weight, updates, transposed=transposed)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    # Gradients, too.
    factors = [factor for one in updates for factor in (one.a, one.b, one.e)]
    cotangent = torch.randn_like(weight)
    for factor, gradient, reference in zip(
        factors,
        torch.autograd.grad(found, factors, cotangent),
        torch.autograd.grad(wanted, factors, cotangent, allow_unused=True),
        strict=True,
    ):
        reference = torch.zeros_like(factor) if reference is None else reference
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


@more_models
def test_a_fresh_adapter_gives_what_the_base_gives(name):
    model = adapted(name)
    assert torch.equal(mixtures.logits(model), mixtures.logits(mixtures.build(name)))
    assert any(isinstance(module, AdaptedParameters) for module in model.modules())


@more_models
def test_each_expert_and_each_router_is_a_module_of_its_own(name):
    names = list(layers_of(adapted(name)))
    (router,) = {one.rpartition(".")[0].rpartition(".")[2] for one in names if one.endswith(".weight")}
    assert router in ("gate", "router")
    for layer in {one.partition(".mlp.")[0] for one in names if "mlp" in one}:
        experts = [one for one in names if one.startswith(layer) and "experts" in one]
        assert [one.rpartition(".experts.")[2] for one in experts] == [
            f"{projection}.{number}" for projection in ("gate_up_proj", "down_proj") for number in range(4)
        ]


def in_float64(model):
    # The grouped product knows no float64; norms and routers compute in float32 all the same.
    model.set_experts_implementation("eager")
    return model.double()


def with_dense_updates(name, model):
    """The base model in float64, its parameters trainable and with all updates in them."""
    base = in_float64(mixtures.build(name))
    parameters = dict(base.named_parameters())
    for module, layer in layers_of(model).items():
        delta = dense(layer.in_use("default")).detach().double()
        if module in parameters:
            parameters[module].data += delta
        else:
            parameter, _, number = module.rpartition(".")
            held = parameters[parameter].data[int(number)]
            held += delta.t() if layer.get_base_layer().transposed else delta
    return base


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@more_models
def test_outputs_and_gradients_are_those_of_a_dense_reference(grow, name, implementation):
    model = adapted(name)
    grow(model)
    base = with_dense_updates(name, model)
    close = {"rtol": 1e-4, "atol": 1e-4}
    if implementation != "grouped_mm":
        model, close = in_float64(model), {"rtol": 1e-5, "atol": 1e-5}
    model.set_experts_implementation(implementation)
    tokens = tokens_of(0)
    wanted, found = (one(input_ids=tokens, labels=tokens, use_cache=False) for one in (base, model))
    torch.testing.assert_close(found.logits.double(), wanted.logits, **close)
    wanted.loss.backward()
    found.loss.backward()
    gradients = {key: parameter.grad for key, parameter in base.named_parameters()}
    for module, layer in layers_of(model).items():
        parameter, _, number = module.rpartition(".")
        g = gradients[module] if module in gradients else gradients[parameter][int(number)]
        g = g.t() if layer.get_base_layer().transposed else g
        factors = layer.factors("default")
        a, b, e = (factor.detach().double() for factor in factors)
        s, diagonal = layer.scaling["default"], torch.diag(e.view(-1))
        of_e = s * torch.einsum("or,oi,ri->r", b, g, a)
        each = s * diagonal @ b.t() @ g, s * g @ a.t() @ diagonal, of_e.view(-1, 1)
        for factor, gradient in zip(factors, each, strict=True):
            torch.testing.assert_close(factor.grad.double(), gradient, **close)


def test_an_expert_that_no_token_came_to_has_gradients_of_0():
    model = adapted("Qwen3Moe")
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    model(input_ids=tokens, use_cache=False).logits.square().sum().backward()
    experts = {name: layer for name, layer in layers_of(model).items() if "experts" in name}
    reached = {name for name, one in experts.items() if one.factors("default")[1].grad.any()}
    # One token, to two of four experts, each of two projections.
    assert len(reached) == 4
    assert all(p.grad is not None for one in experts.values() for p in one.factors("default"))


@more_models
def test_merged_weights_are_those_of_the_reference(grow, name):
    model = adapted(name)
    grow(model)
    in_float64(model)
    reference = with_dense_updates(name, model)
    wanted, before = mixtures.logits(model), copy.deepcopy(model.state_dict())
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(mixtures.logits(model), wanted, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-12, atol=1e-12)
    merged = model.merge_and_unload()
    assert type(merged) is type(reference)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], value, rtol=1e-12, atol=1e-12)


@every_model
def test_unloading_gives_the_base_back(grow, name):
    model = adapted(name)
    grow(model)
    base, unloaded = mixtures.build(name), model.unload()
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in unloaded.state_dict().items())


@every_model
def test_a_disabled_adapter_does_nothing(grow, name):
    model = adapted(name)
    grow(model)
    base = mixtures.logits(mixtures.build(name))
    assert not torch.equal(mixtures.logits(model), base)
    with model.disable_adapter():
        assert torch.equal(mixtures.logits(model), base)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(mixtures.logits(model), base, rtol=1e-4, atol=1e-5)


def test_merged_weights_that_are_not_finite_are_refused(grow):
    model = adapted("Qwen3Moe")
    grow(model)
    layer = layers_of(model)["model.layers.1.mlp.experts.down_proj.2"]
    layer.factors("default")[0].data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert layer.merged_adapters == []


def test_an_adapter_merged_in_some_experts_alone_is_refused(grow):
    model = adapted("Qwen3Moe")
    grow(model)
    layers_of(model)["model.layers.1.mlp.experts.down_proj.2"].merge()
    with pytest.raises(ValueError, match=r"merged, or disabled, in some matrices of 'down_proj'"):
        mixtures.logits(model)


def test_two_adapters_on_the_same_experts_add_up(grow):
    model = adapted("Mixtral")
    model.add_adapter("other", growing(r=3, target_parameters=TARGETS["Mixtral"], target_modules=[]))
    for adapter in ("default", "other"):
        grow(model, adapter_name=adapter)
    deltas = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        deltas[adapter] = mixtures.logits(model)
    assert not torch.equal(deltas["default"], deltas["other"])
    model.base_model.set_adapter(["default", "other"])
    both = mixtures.logits(model)
    model.merge_adapter()
    torch.testing.assert_close(mixtures.logits(model), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.delete_adapter("other")
    torch.testing.assert_close(mixtures.logits(model), deltas["default"], rtol=1e-4, atol=1e-4)


def test_a_second_adapter_on_other_parameters_is_refused():
    model = adapted("Mixtral")
    with pytest.raises(ValueError, match=r"target the same set of parameters, but got \['down_proj'\]"):
        model.add_adapter("other", growing(target_parameters=["down_proj"], target_modules=[]))


def test_a_copy_of_the_model_has_experts_of_its_own(grow):
    model = adapted("Qwen3Moe")
    grow(model)
    twin = copy.deepcopy(model)
    wanted = mixtures.logits(model)
    for layer in layers_of(model).values():
        layer.factors("default")[1].data.zero_()
        layer.get_base_layer().weight.data.zero_()
    assert torch.equal(mixtures.logits(twin), wanted)


def test_the_attributes_of_the_module_are_there():
    model = adapted("DeepseekV3")
    (gate,) = (m for n, m in model.named_modules() if n.endswith("layers.1.mlp.gate"))
    assert isinstance(gate, AdaptedParameters)
    assert gate.e_score_correction_bias.shape == (4,)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = gate.nothing_of_the_kind


def test_a_matrix_is_not_called():
    layer = next(iter(layers_of(adapted("Qwen3Moe")).values()))
    with pytest.raises(NotImplementedError, match="is not called"):
        layer(torch.zeros(1, 32))


class Two(nn.Module):
    """Parameters of a module of one's own: a matrix and a stack."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.one = nn.Parameter(torch.randn(6, 5, generator=generator))
        self.several = nn.Parameter(torch.randn(3, 6, 6, generator=generator))
        self.bias = nn.Parameter(torch.randn(6, generator=generator))

    def forward(self, x):
        return x @ self.one.t() @ self.several[0] + self.bias


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Two()

    def forward(self, x):
        return self.inner(x)


def test_parameters_of_a_module_of_ones_own_are_adapted(grow):
    model = get_peft_model(Holder(), growing(r=2, target_modules=[], target_parameters=["one", "several"]))
    grow(model)
    x = torch.randn(4, 5)
    wanted = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), wanted, rtol=1e-5, atol=1e-5)


def test_autocast_computes_the_update_in_full_precision(grow):
    model = adapted("Qwen3Moe")
    grow(model)
    wanted = mixtures.logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixtures.logits(model)
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_a_base_in_bfloat16_has_factors_in_full_precision(grow):
    torch.manual_seed(0)
    config = growing(r=2, target_modules=[], target_parameters=TARGETS["Qwen3Moe"])
    model = get_peft_model(mixtures.build("Qwen3Moe").bfloat16(), config)
    grow(model)
    assert {p.dtype for layer in layers_of(model).values() for p in layer.factors("default")} == {
        torch.float32
    }
    tokens = tokens_of(0)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
