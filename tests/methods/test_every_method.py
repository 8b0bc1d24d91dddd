"""What every method promises of its update: what it is, where it starts, that it comes out again, and goes
into the base weight or a plain LoRA."""

import copy
import re

import peft
import pytest
import torch
from increlora_rs import export_lora, module_table
from increlora_rs.methods import METHODS
from method_cases import (
    ALPHA,
    CASES,
    EVERY,
    adapted,
    adapted_modules,
    as_weight,
    asked_of,
    batch,
    config_of,
    dense,
    optimizer_of,
    reference,
    run,
    start_of,
    tensors_of,
    trainable,
    trained,
)
from paths import assert_near
from torch import nn
from transformers.pytorch_utils import Conv1D

FAMILIES = {"linear": "linear", "Conv1D": "linear", "embedding": "embedding", "conv2d": "convolution"}


def test_every_method_has_a_row_in_the_table_of_these_tests():
    missing = {method.name for method in METHODS} - set(CASES)
    assert not missing, f"add {missing} to CASES of tests/helpers/method_cases.py"


@pytest.fixture
def base(make_bert):
    return make_bert()


@torch.no_grad()
def logits(model, step=50):
    return model(**batch(step)).logits


# The start.


@EVERY
def test_a_fresh_update_is_0(method, base):
    model = adapted(method, base)
    for name, layer in adapted_modules(model).items():
        assert not dense(method, layer, name).any(), name
        assert not layer.get_delta_weight("default").any(), name


@EVERY
def test_a_fresh_adapter_gives_the_bases_output(method, base, make_bert):
    assert_near(logits(adapted(method, base).eval()), logits(make_bert()))


@EVERY
def test_some_gradient_of_every_module_is_not_0_at_the_start(method, base):
    model = adapted(method, base).train()
    model(**batch(0)).loss.backward()
    for name, layer in adapted_modules(model).items():
        gradients = [p.grad for p in layer.parameters() if p.requires_grad]
        assert any(bool(gradient.any()) for gradient in gradients), name


@EVERY
def test_every_trained_parameter_moves_within_a_few_steps(method, base):
    model = adapted(method, base).train()
    before = trainable(model)
    run(model, optimizer_of(model), range(3))
    after = trainable(model)
    assert not [name for name in before if torch.equal(before[name], after[name])]


@EVERY
def test_the_base_is_not_trained(method, base, make_bert):
    model = trained(method, base)
    inside = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    for name, parameter in make_bert().named_parameters():
        assert not inside[name].requires_grad, name
        assert torch.equal(inside[name], parameter), name


@EVERY
def test_the_trained_numbers_are_as_many_as_the_paper_counts(method, base):
    model = adapted(method, base)
    layers, case = adapted_modules(model), CASES[method.name]
    wanted = case.of_all or sum(
        case.count(asked_of(method, name), *layer.get_base_layer().weight.shape)
        for name, layer in layers.items()
    )
    assert len(layers) == 6
    assert model.get_nb_trainable_parameters()[0] == wanted


@EVERY
def test_ranks_are_r_and_the_patterns(method, base):
    layers = adapted_modules(adapted(method, base))
    ranks = {name: layer.r["default"] for name, layer in layers.items()}
    assert ranks == {name: start_of(method, layer, name) for name, layer in layers.items()}
    assert len(ranks) == 6


@EVERY
def test_two_models_of_one_seed_start_alike(method, make_bert):
    first, second = (trainable(adapted(method, make_bert())) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# The update.


@EVERY
def test_outputs_are_those_of_the_dense_update(method, base, make_bert):
    model = trained(method, base).double()
    inputs = batch(50)
    wanted = reference(method, model, make_bert(), inputs).logits
    torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(wanted, logits(make_bert().double()), atol=1e-3)


@EVERY
def test_gradients_are_those_of_the_dense_update(method, base, make_bert):
    model = trained(method, base).double().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    inputs = batch(50)
    found = torch.autograd.grad(model(**inputs).loss, parameters)
    wanted = torch.autograd.grad(reference(method, model, make_bert(), inputs).loss, parameters)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@EVERY
def test_alpha_scales_the_update(method, make_bert):
    one, two = (
        adapted(method, make_bert(), init_lora_weights=False, lora_alpha=alpha)
        for alpha in (ALPHA, 2 * ALPHA)
    )
    for name, layer in adapted_modules(two).items():
        assert_near(
            layer.get_delta_weight("default"), 2 * adapted_modules(one)[name].get_delta_weight("default")
        )


@EVERY
def test_alpha_pattern_scales_the_update_of_its_modules(method, base):
    model = adapted(method, base, init_lora_weights=False, alpha_pattern={"query": 2 * ALPHA})
    for name, layer in adapted_modules(model).items():
        wanted = dense(method, layer, name, alpha=2 * ALPHA if name.endswith("query") else ALPHA)
        assert_near(layer.get_delta_weight("default"), wanted.float())


@EVERY
def test_dropout_acts_in_training_alone(method, base, make_bert):
    model = trained(method, base, lora_dropout=0.5)
    whole = trained(method, make_bert(), lora_dropout=0.5)
    assert torch.equal(logits(model), logits(whole))
    model.train()
    assert not torch.allclose(logits(model), logits(model), atol=1e-4)


@EVERY
def test_under_autocast_the_output_is_near_the_exact_one(method, base):
    model = trained(method, base)
    exact = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = logits(model)
    torch.testing.assert_close(near.float(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


@EVERY
def test_a_model_of_bfloat16_gives_an_output_near_the_exact_one(method, base):
    model = trained(method, base)
    exact = logits(model)
    near = logits(model.to(torch.bfloat16))
    assert near.dtype == torch.bfloat16
    torch.testing.assert_close(near.float(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


# Merging.


@EVERY
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
def test_a_merged_adapter_gives_the_same_output_and_comes_out_again(method, base, make_bert, safe):
    model = trained(method, base)
    wanted = logits(model)
    model.merge_adapter(safe_merge=safe)
    assert_near(logits(model), wanted)
    model.unmerge_adapter()
    assert_near(logits(model), wanted)
    weights = dict(make_bert().named_parameters())
    for name, layer in adapted_modules(model).items():
        assert_near(layer.get_base_layer().weight, weights[f"{name}.weight"])


@EVERY
def test_a_merged_weight_is_the_bases_plus_the_dense_update(method, base, make_bert):
    model = trained(method, base).double()
    deltas = {name: dense(method, layer, name) for name, layer in adapted_modules(model).items()}
    merged, plain = model.merge_and_unload(), make_bert().double()
    for name, delta in deltas.items():
        wanted = plain.get_submodule(name).weight + delta
        torch.testing.assert_close(merged.get_submodule(name).weight, wanted, rtol=1e-12, atol=1e-12)


@EVERY
def test_a_merged_model_is_a_plain_one_with_the_same_output(method, base):
    model = trained(method, base)
    wanted = logits(model)
    merged = model.merge_and_unload()
    assert not adapted_modules(merged)
    assert_near(logits(merged), wanted)


@EVERY
def test_an_unloaded_model_is_the_base(method, base, make_bert):
    unloaded = trained(method, base).unload()
    assert not adapted_modules(unloaded)
    assert torch.equal(logits(unloaded), logits(make_bert()))


# Export.


@EVERY
@pytest.mark.parametrize("source", ["model", "directory"])
@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_plain_peft_gets_the_same_outputs_of_an_export(method, base, make_bert, tmp_path, layout, source):
    model = trained(method, base)
    if source == "directory":
        model.save_pretrained(tmp_path / "saved")
    exported = export_lora(model if source == "model" else tmp_path / "saved", tmp_path / "lora", layout)
    assert exported.error == 0.0
    loaded = peft.PeftModel.from_pretrained(make_bert(), tmp_path / "lora").eval()
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    assert all(type(layer).__module__.startswith("peft.") for layer in adapted_modules(loaded).values())
    assert_near(logits(loaded), logits(model))


@pytest.mark.slow
@EVERY
def test_a_process_without_this_package_gets_the_same_outputs_of_an_export(
    method, base, bert_dir, tokens, tmp_path, plain_peft
):
    model = trained(method, base)
    export_lora(model, tmp_path)
    answer = plain_peft(bert_dir, tmp_path, tokens)
    assert not answer["knows_increlora"]
    with torch.no_grad():
        assert_near(torch.tensor(answer["logits"]), model(tokens).logits)


# Kinds of modules.


def build(method, kind):
    torch.manual_seed(5)
    size = CASES[method.name].size
    modules = {
        "linear": lambda: nn.Linear(size(6), size(5)),
        "Conv1D": lambda: Conv1D(size(5), size(6)),
        "embedding": lambda: nn.Embedding(size(9), size(6), padding_idx=2),
        "conv2d": lambda: nn.Conv2d(size(3), size(5), (2, 3), stride=(1, 2), padding=1),
    }
    return nn.ModuleDict({"body": modules[kind](), "tail": nn.Linear(4, 4)})


def input_of(method, kind):
    generator, size = torch.Generator().manual_seed(6), CASES[method.name].size
    if kind == "embedding":
        return torch.tensor([[1, 2, 3], [8, 0, 1]])
    shape = (2, size(3), 6, 7) if kind == "conv2d" else (2, 3, size(6))
    return torch.randn(shape, generator=generator)


def adapted_kind(method, kind):
    # Random, for a fresh update is 0.
    return adapted(
        method, build(method, kind), target_modules=["body"], rank_pattern={}, init_lora_weights=False
    ).double()


HAS = [(m, kind) for m in METHODS for kind, family in FAMILIES.items() if family in CASES[m.name].kinds]
HAS_NOT = [
    (m, kind) for m in METHODS for kind, family in FAMILIES.items() if family not in CASES[m.name].kinds
]


def _id(value):
    return getattr(value, "name", value)


@pytest.mark.parametrize(("method", "kind"), HAS, ids=_id)
def test_a_module_of_each_kind_gives_the_output_of_the_dense_update(method, kind):
    (layer,) = adapted_modules(adapted_kind(method, kind)).values()
    plain, x = build(method, kind)["body"].double(), input_of(method, kind)
    x = x.double() if x.is_floating_point() else x
    delta = as_weight(dense(method, layer, "body"), layer)
    wanted = torch.func.functional_call(plain, {"weight": plain.weight + delta}, x)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("method", "kind"), HAS, ids=_id)
def test_a_module_of_each_kind_learns_from_its_start(method, kind):
    model = adapted(method, build(method, kind), target_modules=["body"], rank_pattern={})
    (layer,) = adapted_modules(model).values()
    assert not layer.get_delta_weight("default").any()
    optimizer = optimizer_of(model)
    for _ in range(2):
        layer(input_of(method, kind)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert layer.get_delta_weight("default").any()


@pytest.mark.parametrize(("method", "kind"), HAS, ids=_id)
def test_a_module_of_each_kind_is_saved_and_loaded(method, kind, tmp_path):
    model = adapted_kind(method, kind).float()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(method, kind), tmp_path)
    first, second = (next(iter(adapted_modules(each).values())) for each in (model, loaded))
    assert torch.equal(first(input_of(method, kind)), second(input_of(method, kind)))


@pytest.mark.parametrize(("method", "kind"), HAS, ids=_id)
def test_a_module_of_each_kind_is_exported(method, kind, tmp_path):
    model = adapted_kind(method, kind).float()
    export_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(method, kind), tmp_path)
    first, second = (next(iter(adapted_modules(each).values())) for each in (model, loaded))
    assert_near(second(input_of(method, kind)), first(input_of(method, kind)))


@pytest.mark.parametrize(("method", "kind"), HAS_NOT, ids=_id)
def test_a_module_of_another_kind_is_refused_by_name_with_the_way_out(method, kind):
    family = FAMILIES[kind]
    with pytest.raises(ValueError, match=f"body.*'{family}'.*{method.title}.*leave it out of target_modules"):
        adapted(method, build(method, kind), target_modules=["body"], rank_pattern={})


@EVERY
@pytest.mark.parametrize("size", [(0, 4), (4, 0)], ids=["no input", "no output"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_module_without_numbers_is_refused_by_name(method, size):
    base = nn.ModuleDict({"body": nn.Linear(*size), "tail": nn.Linear(4, 4)})
    told = f"body: it has {size[0]} inputs and {size[1]} outputs.*leave it out of target_modules"
    with pytest.raises(ValueError, match=told):
        adapted(method, base, target_modules=["body"], rank_pattern={})


# Several adapters.


@pytest.fixture
def two(method, make_bert):
    """Adapters "default" and "second" on one base, both off their start; "default" is active."""
    model = trained(method, make_bert())
    model.add_adapter("second", config_of(method, init_lora_weights=False))
    return model.eval()


@EVERY
def test_set_adapter_switches(method, two, make_bert):
    first = logits(two)
    two.set_adapter("second")
    second = logits(two)
    assert not torch.allclose(first, second, atol=1e-3)
    wanted = reference(method, two, make_bert(), batch(50), adapters=("second",)).logits
    assert_near(second.double(), wanted, torch.float32)
    two.set_adapter("default")
    assert torch.equal(logits(two), first)


@EVERY
def test_several_active_adapters_add_up(method, two, make_bert):
    two.base_model.set_adapter(["default", "second"])
    wanted = reference(method, two, make_bert(), batch(50), adapters=("default", "second")).logits
    assert_near(logits(two).double(), wanted, torch.float32)


@EVERY
def test_a_mixed_batch_gives_each_row_its_adapter(method, two, make_bert):
    rows = {"default": logits(two)}
    two.set_adapter("second")
    rows["second"] = logits(two)
    rows["__base__"] = logits(make_bert())
    names = ["second", "__base__", "default", "second"]
    with torch.no_grad():
        mixed = two(input_ids=batch(50)["input_ids"], adapter_names=names).logits
    for k, name in enumerate(names):
        assert_near(mixed[k], rows[name][k])


@EVERY
def test_a_disabled_adapter_gives_the_bases_output(method, two, make_bert):
    before = logits(two)
    with two.disable_adapter():
        assert torch.equal(logits(two), logits(make_bert()))
    assert torch.equal(logits(two), before)


@EVERY
def test_deleting_an_adapter_leaves_the_other_and_nothing_of_itself(method, two):
    before = logits(two)
    two.delete_adapter("second")
    assert torch.equal(logits(two), before)
    assert not [name for name in two.state_dict() if "second" in name]
    for layer in adapted_modules(two).values():
        assert all("second" not in getattr(layer, name) for name in CASES[method.name].tensors)


@EVERY
def test_a_deleted_adapter_can_be_added_again(method, two):
    two.delete_adapter("second")
    two.add_adapter("second", config_of(method))
    two.set_adapter("second")
    assert all(not layer.get_delta_weight("second").any() for layer in adapted_modules(two).values())


@EVERY
def test_an_added_adapter_leaves_the_first_ones_training_alone(method, two, make_bert):
    alone, optimizer = trained(method, make_bert()).train(), None
    for model in (alone, two.train()):
        optimizer = optimizer_of(model)
        run(model, optimizer, range(10, 12))
    found = {name: p for name, p in trainable(two).items() if "default" in name}
    assert all(torch.equal(found[name], p) for name, p in trainable(alone).items())


@EVERY
def test_a_weighted_sum_is_exact_or_refused_with_the_way_out(method, two, make_bert):
    try:
        two.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum", combination_type="cat")
    except ValueError as error:
        assert method.title in str(error)
        assert "export_lora" in str(error)
        return
    for name, layer in adapted_modules(two).items():
        wanted = 0.5 * dense(method, layer, name) - 2.0 * dense(method, layer, name, "second")
        assert_near(layer.get_delta_weight("sum"), wanted.float())


@EVERY
def test_a_copy_is_independent(method, base):
    model = trained(method, base)
    twin, before = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(twin), before)
    run(twin.train(), optimizer_of(twin), range(10, 12))
    assert torch.equal(logits(model), before)
    for name, layer in adapted_modules(twin).items():
        for key, tensor in tensors_of(method, layer).items():
            other = tensors_of(method, adapted_modules(model)[name])[key]
            assert tensor.data_ptr() != other.data_ptr(), key


@EVERY
def test_the_table_of_modules_has_rank_size_and_norm_of_every_one(method, base):
    model = trained(method, base)
    rows = {row.name: row for row in module_table(model).rows}
    layers = adapted_modules(model)
    assert rows.keys() == layers.keys()
    for name, layer in layers.items():
        wanted = dense(method, layer, name).detach()
        assert (rows[name].rank, rows[name].shape) == (start_of(method, layer, name), tuple(wanted.shape))
        assert rows[name].norm == pytest.approx(float(wanted.norm()), rel=1e-5)


# Bad arguments, each with name, value and a way out.


SHARED = [
    ({"r": 0}, "r=0"),
    ({"r": "8"}, "r='8'"),
    ({"lora_alpha": 0}, "lora_alpha=0"),
    ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
    ({"rank_pattern": {"query": -1}}, "rank_pattern['query']=-1"),
    ({"rank_pattern": {"(": 2}}, "'('"),
    ({"alpha_pattern": {"query": -1}}, "alpha_pattern['query']=-1"),
    ({"bias": "some"}, "bias='some'"),
    ({"use_rslora": "yes"}, "use_rslora='yes'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"target_modules": 3}, "target_modules=3"),
    ({"target_modules": "("}, "target_modules='('"),
    ({"modules_to_save": [1]}, "modules_to_save"),
    ({"layers_to_transform": ["first"]}, "layers_to_transform"),
    ({"module_kinds": {"query": "wide"}}, "module_kinds['query']='wide'"),
    ({"use_dora": "yes"}, "use_dora='yes'"),
    ({"layer_replication": [[0, 1]]}, "layer_replication=[[0, 1]]"),
]
WITHOUT_DORA = ("lora_mini", "lorta", "melora", "mora")
WAY_OUT = "must be|leave|use |take |give |put |lower|raise"
BAD = [
    (method, arguments, told) for method in METHODS for arguments, told in (*SHARED, *CASES[method.name].bad)
]
BAD += [(method, {"use_dora": True}, "use_dora=True") for method in METHODS if method.name in WITHOUT_DORA]
BAD += [
    (method, {"target_parameters": ["weight"]}, "target_parameters=['weight']")
    for method in METHODS
    if method.name != "increlora"
]
# IncreLoRA's budget may be a fraction.
BAD += [(method, {"r": 1.5}, "r=1.5") for method in METHODS if method.name != "increlora"]


@pytest.mark.parametrize(("method", "arguments", "told"), BAD, ids=[f"{m.name}-{told}" for m, _, told in BAD])
def test_a_bad_argument_is_refused_with_name_value_and_way_out(method, arguments, told):
    with pytest.raises((ValueError, TypeError), match=re.escape(told)) as refusal:
        config_of(method, **arguments)
    assert re.search(WAY_OUT, str(refusal.value))


@EVERY
def test_an_argument_that_is_none_of_the_methods_is_refused(method):
    with pytest.raises(TypeError, match="rang"):
        config_of(method, rang=3)


def tall(size):
    torch.manual_seed(5)
    return nn.ModuleDict({"body": nn.Linear(size(6), size(1))})


@EVERY
def test_a_rank_above_the_modules_size_is_refused_by_module_where_ranks_grow(method):
    if CASES[method.name].ranks != "grow":
        pytest.skip("its ranks do not grow")
    with pytest.raises(ValueError, match=r"body.*rank 2 is more than 1.*rank_pattern.*target_modules"):
        adapted(method, tall(CASES[method.name].size), target_modules=["body"], rank_pattern={})


@EVERY
def test_a_rank_above_the_modules_size_is_taken_and_exported_where_ranks_do_not_grow(method, tmp_path):
    if CASES[method.name].ranks == "grow":
        pytest.skip("its ranks grow")
    settings = {"target_modules": ["body"], "rank_pattern": {}, "init_lora_weights": False}
    (layer,) = adapted_modules(model := adapted(method, tall(CASES[method.name].size), **settings)).values()
    export_lora(model, tmp_path)
    (lora,) = adapted_modules(
        peft.PeftModel.from_pretrained(tall(CASES[method.name].size), tmp_path)
    ).values()
    assert layer.r["default"] == lora.r["default"] == start_of(method, layer, "body")
    x = input_of(method, "linear")
    assert_near(lora(x), layer(x))


@EVERY
def test_unknown_target_modules_are_refused_with_those_there_are(method, base):
    with pytest.raises(ValueError, match=r"target_modules: \['q_proj'\].*'query'"):
        adapted(method, base, target_modules=["q_proj"])


@EVERY
def test_a_custom_layer_class_is_refused_by_name(method):
    with pytest.raises(ValueError, match=rf"custom_modules=.*{method.config.__name__}"):
        config_of(method)._register_custom_module({nn.Linear: nn.Linear})


@EVERY
def test_an_adapter_beside_a_plain_lora_is_refused_with_the_way_out(method, base):
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"])).base_model.model
    with pytest.raises(ValueError, match="merge_and_unload"):
        adapted(method, lora)
