"""The tuner in PEFT: creating, saving, loading in every way, switching, merging, choosing targets."""

import json
import re
from collections import OrderedDict

import pytest
import torch
from growing import growing
from hypothesis import given
from hypothesis import strategies as st
from increlora_rs import IncreLoraConfig
from increlora_rs.layers import Linear
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support import names as names_of_modules
from increlora_rs.support.names import anchored, short
from peft import (
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

RANKS = {
    "bert.encoder.layer.0.attention.self.query": 1,
    "bert.encoder.layer.0.attention.self.value": 4,
    "bert.encoder.layer.1.attention.self.query": 2,
    "bert.encoder.layer.1.attention.self.value": 3,
}
HIDDEN = 32


def configure(form, **kwargs):
    values = {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 6} | kwargs
    return IncreLoraConfig.paper(**values) if form == "paper" else growing(**values)


@pytest.fixture(params=["default", "paper"])
def form(request):
    return request.param


@pytest.fixture
def trained(make_bert, grow, form):
    """A BERT whose adapter has grown to RANKS; in the paper's form with components in reserve."""
    model = get_peft_model(make_bert(), configure(form))
    grow(model, RANKS, reserve=1 if form == "paper" else 0)
    return model.eval()


@pytest.fixture
def saved(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    return tmp_path


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


def ranks_of(model, adapter_name="default"):
    return {short(name): layer.r[adapter_name] for name, layer in adapted_layers(model, adapter_name).items()}


# Ways of loading: each gives the model with the adapter of the directory active.


def by_peft_model(base, path, form):
    return PeftModel.from_pretrained(base, path)


def by_low_cpu_mem_usage(base, path, form):
    return PeftModel.from_pretrained(base, path, low_cpu_mem_usage=True)


def as_trainable(base, path, form):
    return PeftModel.from_pretrained(base, path, is_trainable=True)


def over_an_initial_adapter(base, path, form):
    model = get_peft_model(base, configure(form))
    model.load_adapter(path, "default", is_trainable=True)
    return model


def as_second_adapter(base, path, form):
    model = get_peft_model(base, configure(form))
    model.load_adapter(path, "second")
    model.set_adapter("second")
    return model


def as_second_adapter_low_cpu_mem_usage(base, path, form):
    model = get_peft_model(base, configure(form))
    model.load_adapter(path, "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    return model


def by_state_dict(base, path, form):
    model = get_peft_model(base, configure(form))
    set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
    return model


def by_injection(base, path, form):
    model = inject_adapter_in_model(IncreLoraConfig.from_pretrained(str(path)), base)
    set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
    return model


def by_injection_at_initial_rank(base, path, form):
    model = inject_adapter_in_model(configure(form), base)
    set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
    return model


def by_transformers(base, path, form):
    base.load_adapter(str(path))
    return base


WAYS = [
    by_peft_model,
    by_low_cpu_mem_usage,
    as_trainable,
    over_an_initial_adapter,
    as_second_adapter,
    as_second_adapter_low_cpu_mem_usage,
    by_state_dict,
    by_injection,
    by_injection_at_initial_rank,
    by_transformers,
]
ways = pytest.mark.parametrize("load", WAYS, ids=lambda way: way.__name__)


# Saving and loading.


@ways
def test_loaded_adapter_gives_the_same_outputs(trained, saved, make_bert, tokens, form, load):
    assert torch.equal(logits(load(make_bert(), saved, form), tokens), logits(trained, tokens))


@ways
def test_loaded_adapter_has_the_saved_ranks(saved, make_bert, form, load):
    name = "second" if "second" in load.__name__ else "default"
    assert ranks_of(load(make_bert(), saved, form), name) == RANKS


@ways
def test_loaded_adapter_saves_the_same_again(saved, make_bert, form, load, tmp_path):
    name = "second" if "second" in load.__name__ else "default"
    again = get_peft_model_state_dict(load(make_bert(), saved, form), adapter_name=name)
    before = load_file(saved / "adapter_model.safetensors")
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in before.items()} or {
        f"base_model.model.{k}": v.tolist() for k, v in again.items()
    } == {k: v.tolist() for k, v in before.items()}


def test_adapter_loads_in_a_new_process(trained, saved, bert_dir, tokens, new_process):
    answer = new_process(bert_dir, saved, tokens)
    assert torch.equal(torch.tensor(answer["logits"]), logits(trained, tokens))


def test_adapter_loads_with_its_base_through_auto_peft_model(bert_dir, tmp_path, grow, tokens, form):
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(bert_dir)
    model = get_peft_model(base, configure(form, task_type="SEQ_CLS"))
    grow(model, RANKS)
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_adapter_named_otherwise_loads_from_its_folder(make_bert, grow, tokens, tmp_path, form):
    model = get_peft_model(make_bert(), configure(form), adapter_name="mine")
    grow(model, RANKS, adapter_name="mine")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "mine")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_two_adapters_are_saved_each_with_its_ranks(trained, grow, tmp_path, form, make_bert):
    trained.add_adapter("other", configure(form, target_modules=["key"]))
    ranks = grow(trained, {"bert.encoder.layer.1.attention.self.key": 5}, adapter_name="other")
    trained.save_pretrained(tmp_path)
    assert ranks_of(PeftModel.from_pretrained(make_bert(), tmp_path)) == RANKS
    assert ranks_of(PeftModel.from_pretrained(make_bert(), tmp_path / "other")) == ranks


def test_adapter_saved_without_safetensors_loads(trained, tokens, tmp_path, make_bert):
    trained.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(p.name for p in tmp_path.glob("adapter_model.*")) == ["adapter_model.bin"]
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(trained, tokens))


def test_adapter_of_higher_rank_is_replaced_by_a_loaded_one(trained, saved, make_bert, grow, tokens, form):
    model = get_peft_model(make_bert(), configure(form))
    grow(model, dict.fromkeys(RANKS, 6), reserve=2, seed=1)
    model.load_adapter(saved, "default")
    assert ranks_of(model) == RANKS
    assert torch.equal(logits(model, tokens), logits(trained, tokens))


def test_loading_over_an_adapter_keeps_its_parameter_objects(saved, make_bert, form):
    model = get_peft_model(make_bert(), configure(form))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    model.load_adapter(saved, "default", is_trainable=True)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize("trainable", [True, False])
def test_loaded_adapter_is_trainable_as_asked(saved, make_bert, trainable):
    model = PeftModel.from_pretrained(make_bert(), saved, is_trainable=trainable)
    flags = {p.requires_grad for name, p in model.named_parameters() if "lora_" in name}
    assert flags == {trainable}


def test_bfloat16_model_comes_back(make_bert, grow, tokens, tmp_path, form):
    model = get_peft_model(make_bert().bfloat16(), configure(form))
    grow(model, RANKS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert().bfloat16(), tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_saved_adapter_holds_active_components_only(saved):
    shapes = {key: tuple(t.shape) for key, t in load_file(saved / "adapter_model.safetensors").items()}
    wanted = {}
    for name, rank in RANKS.items():
        wanted[f"base_model.model.{name}.lora_A.weight"] = (rank, HIDDEN)
        wanted[f"base_model.model.{name}.lora_B.weight"] = (HIDDEN, rank)
        wanted[f"base_model.model.{name}.lora_E.weight"] = (rank, 1)
    assert shapes == wanted


def test_saving_leaves_the_reserve_in_the_model(make_bert, grow, tmp_path):
    model = get_peft_model(make_bert(), configure("paper"))
    grow(model, RANKS, reserve=2)
    model.save_pretrained(tmp_path)
    assert {
        layer.structure.reserve(layer, "default") for layer in adapted_layers(model, "default").values()
    } == {2}


def test_saved_ranks_are_anchored_full_names(saved):
    pattern = json.loads((saved / "adapter_config.json").read_text())["rank_pattern"]
    wanted = {f"^{name}": rank for name, rank in RANKS.items()}
    assert {key.replace("\\", ""): rank for key, rank in pattern.items()} == wanted


@given(st.lists(st.text("ab.\\n+", min_size=1, max_size=5), unique=True, max_size=8))
def test_an_anchored_name_matches_no_other(names):
    keys = anchored(tuple(names))
    matches = {
        name: [other for other in names if re.match(f"{key}$", other)]
        for name, key in zip(names, keys, strict=True)
    }
    assert matches == {name: [name] for name in names}


def test_a_name_without_a_rival_is_not_escaped():
    names = ("a.b", "a.c", "a.bb", "x-y")
    assert anchored(names) == ("^a.b", "^a.c", "^a.bb", r"^x\-y")


def test_a_name_that_matches_another_is_escaped():
    assert anchored(("a.b", "acb", "a.c.d", "a.cxd")) == (r"^a\.b", "^acb", r"^a\.c\.d", "^a.cxd")


def test_many_names_are_anchored_with_work_that_grows_as_they_do(monkeypatch):
    compared = []
    plain = names_of_modules._dotted
    monkeypatch.setattr(names_of_modules, "_dotted", lambda *args: compared.append(args) or plain(*args))

    def work(count):
        compared.clear()
        names = tuple(f"model.layers.{i}.self_attn.{part}_proj" for i in range(count // 4) for part in "qkvo")
        anchored.__wrapped__(names)
        return len(compared)

    assert 0 < work(4000) < 30 * work(400)


def nested():
    inner = nn.ModuleDict({"lin": nn.Linear(8, 8), "outer": nn.ModuleDict({"lin": nn.Linear(8, 8)})})
    return nn.ModuleDict({"lin": nn.Linear(8, 8), "outer": inner})


@pytest.mark.parametrize("order", [[5, 2, 3], [1, 4, 2], [2, 3, 6]])
def test_module_whose_name_ends_anothers_keeps_its_rank(grow, tmp_path, order):
    ranks = dict(zip(["lin", "outer.lin", "outer.outer.lin"], order, strict=True))
    model = get_peft_model(nested(), growing(target_modules=["lin"]))
    grow(model, ranks)
    model.save_pretrained(tmp_path)
    config = IncreLoraConfig.from_pretrained(str(tmp_path))
    assert ranks_of(get_peft_model(nested(), config)) == ranks


def test_module_whose_name_matches_anothers_as_a_pattern_keeps_its_rank(grow, tmp_path):
    def build():
        return nn.ModuleDict({"a": nn.ModuleDict({"lin": nn.Linear(8, 8)}), "a_lin": nn.Linear(8, 8)})

    model = get_peft_model(build(), growing(target_modules=["a.lin", "a_lin"]))
    grow(model, {"a.lin": 2, "a_lin": 5})
    model.save_pretrained(tmp_path)
    config = IncreLoraConfig.from_pretrained(str(tmp_path))
    assert ranks_of(get_peft_model(build(), config)) == {"a.lin": 2, "a_lin": 5}


# Counting and status.


def test_trainable_parameters_are_right_after_growth(trained, form, capsys):
    wanted = sum(rank * (2 * HIDDEN + 1) for rank in RANKS.values())
    if form == "paper":
        wanted += len(RANKS) * 2 * HIDDEN
    trained.print_trainable_parameters()
    assert f"trainable params: {wanted:,} ||" in capsys.readouterr().out


def test_all_parameters_count_base_and_adapter(trained, make_bert):
    trainable, total = trained.get_nb_trainable_parameters()
    assert total - trainable == sum(p.numel() for p in make_bert().parameters())


def test_only_the_adapter_is_trainable(trained):
    names = {name for name, p in trained.named_parameters() if p.requires_grad}
    wanted = {f"base_model.model.{name}.lora_{f}.default.weight" for name in RANKS for f in "ABE"}
    assert names == wanted


def test_model_status_names_the_method(trained):
    status = trained.get_model_status()
    assert (status.peft_types, status.num_adapter_layers, status.active_adapters) == (
        {"default": "INCRELORA"},
        len(RANKS),
        ["default"],
    )


# Several adapters.


@pytest.fixture
def two(trained, grow, form):
    """``trained`` with a second adapter "other" of other ranks."""
    trained.add_adapter("other", configure(form))
    grow(trained, {name: 6 - rank for name, rank in RANKS.items()}, adapter_name="other", seed=1)
    return trained


def test_set_adapter_switches(two, tokens):
    first = logits(two, tokens)
    two.set_adapter("other")
    other = logits(two, tokens)
    two.set_adapter("default")
    assert torch.equal(logits(two, tokens), first)
    assert not torch.allclose(first, other, atol=1e-3)


@pytest.mark.parametrize("targets", [["query", "value"], ["key"]], ids=["same modules", "other modules"])
def test_added_adapter_waits_for_set_adapter(trained, form, targets):
    trained.add_adapter("other", configure(form, target_modules=targets))
    trainable = {name.rsplit(".", 2)[-2] for name, p in trained.named_parameters() if p.requires_grad}
    assert trainable == {"default"}


def test_layers_of_one_adapter_share_a_probe_with_a_slot_each(two):
    probes = []
    for name in ("default", "other"):
        layers = adapted_layers(two, name).values()
        assert sorted(layer.slots[name] for layer in layers) == list(range(len(RANKS)))
        probes.append({id(layer.probes[name]) for layer in layers})
    assert [len(found) for found in probes] == [1, 1]
    assert probes[0] != probes[1]


def test_set_adapter_moves_the_training(two):
    two.set_adapter("other")
    trainable = {name.rsplit(".", 2)[-2] for name, p in two.named_parameters() if p.requires_grad}
    assert trainable == {"other"}


def test_deleted_adapter_leaves_the_other(two, tokens):
    first = logits(two, tokens)
    two.delete_adapter("other")
    assert ranks_of(two, "other") == {}
    assert [name for name in two.state_dict() if ".other." in name] == []
    assert torch.equal(logits(two, tokens), first)


def test_deleted_adapter_can_be_added_again(two, form):
    two.delete_adapter("other")
    two.add_adapter("other", configure(form))
    assert set(ranks_of(two, "other").values()) == {1}


def test_deleting_the_active_adapter_activates_the_other(two, tokens):
    two.set_adapter("other")
    other = logits(two, tokens)
    two.delete_adapter("default")
    assert torch.equal(logits(two, tokens), other)


def test_mixed_batch_gives_each_row_its_adapter(two, make_bert, tokens):
    rows = {"__base__": logits(make_bert(), tokens), "default": logits(two, tokens)}
    two.set_adapter("other")
    rows["other"] = logits(two, tokens)
    names = ["other", "default", "__base__"]
    with torch.no_grad():
        mixed = two.eval()(tokens[:1].expand(3, -1), adapter_names=names).logits
    wanted = torch.stack([rows[name][0] for name in names])
    torch.testing.assert_close(mixed, wanted, rtol=0.0, atol=1e-5)


def test_disabled_adapter_gives_the_base_outputs(trained, make_bert, tokens):
    with trained.disable_adapter():
        assert torch.equal(logits(trained, tokens), logits(make_bert(), tokens))


# Merging.


def test_merged_and_unloaded_model_gives_the_same_outputs(trained, tokens):
    before = logits(trained, tokens)
    merged = trained.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), before, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_unloaded_model_has_the_base_modules(trained, make_bert, how):
    model = getattr(trained, how)()
    assert [type(m) for m in model.modules()] == [type(m) for m in make_bert().modules()]
    assert list(model.state_dict()) == list(make_bert().state_dict())


def test_unloaded_model_gives_the_base_outputs(trained, make_bert, tokens):
    assert torch.equal(logits(trained.unload(), tokens), logits(make_bert(), tokens))


def test_merged_adapter_gives_the_same_outputs_and_comes_out_again(trained, make_bert, tokens):
    before = logits(trained, tokens)
    trained.merge_adapter()
    torch.testing.assert_close(logits(trained, tokens), before, rtol=0.0, atol=1e-5)
    trained.unmerge_adapter()
    torch.testing.assert_close(logits(trained.unload(), tokens), logits(make_bert(), tokens))


def test_safe_merge_names_what_is_not_finite(trained):
    layer = next(iter(adapted_layers(trained, "default").values()))
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        trained.merge_and_unload(safe_merge=True)


def test_saving_while_merged_saves_the_adapter(trained, make_bert, tokens, tmp_path):
    before = logits(trained, tokens)
    trained.merge_adapter()
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path)
    assert torch.equal(logits(loaded, tokens), before)


# Choosing modules and their ranks.


def names_of(model):
    return list(ranks_of(model))


def layer_names(layers, kinds):
    return [f"bert.encoder.layer.{layer}.attention.self.{kind}" for layer in layers for kind in kinds]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"target_modules": None}, layer_names([0, 1], ["query", "value"])),
        ({"target_modules": ["query"]}, layer_names([0, 1], ["query"])),
        ({"target_modules": r".*layer\.1\..*\.(query|key)"}, layer_names([1], ["query", "key"])),
        ({"layers_to_transform": 1}, layer_names([1], ["query", "value"])),
        ({"layers_to_transform": [0], "layers_pattern": "layer"}, layer_names([0], ["query", "value"])),
        ({"exclude_modules": ["value"]}, layer_names([0, 1], ["query"])),
        ({"exclude_modules": r".*layer\.0.*"}, layer_names([1], ["query", "value"])),
    ],
)
def test_modules_are_chosen_as_lora_chooses_them(make_bert, form, arguments, wanted):
    assert names_of(get_peft_model(make_bert(), configure(form, **arguments))) == wanted


def test_all_linear_takes_every_linear_module_but_the_head(make_llama):
    model = get_peft_model(make_llama(), configure("default", target_modules="all-linear"))
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(names_of(model)) == 2 * len(kinds)
    assert {name.rsplit(".", 1)[-1] for name in names_of(model)} == set(kinds)


def test_unknown_target_modules_are_refused_with_the_modules_there_are(make_bert):
    with pytest.raises(ValueError, match="target_modules") as error:
        get_peft_model(make_bert(), configure("default", target_modules=["q_proj", "v_proj"]))
    assert "'q_proj', 'v_proj'" in str(error.value)
    assert "'query'" in str(error.value)


def test_target_modules_for_several_architectures_are_taken_and_the_unknown_are_told(make_bert):
    with pytest.warns(UserWarning, match=r"target_modules: \['q_proj'\] match no module"):
        model = get_peft_model(make_bert(), configure("default", target_modules=["query", "q_proj"]))
    assert set(ranks_of(model)) == set(layer_names([0, 1], ["query"]))


@pytest.mark.parametrize("targets", [["q_proj"], r".*q_proj", []])
def test_no_target_module_found_is_refused(make_bert, targets):
    with pytest.raises(ValueError, match="target"):
        get_peft_model(make_bert(), configure("default", target_modules=targets))


def test_refused_targets_leave_the_model_as_it_was(make_bert, tokens):
    base = make_bert()
    with pytest.raises(ValueError):
        get_peft_model(base, configure("default", target_modules=["q_proj"]))
    assert [m for m in base.modules() if isinstance(m, Linear)] == []


@pytest.mark.parametrize(
    ("build", "target", "kind"),
    [
        (lambda: nn.ModuleDict({"att": nn.MultiheadAttention(8, 2)}), "att", "MultiheadAttention"),
        (
            lambda: nn.ModuleDict({"att": nn.MultiheadAttention(8, 2)}),
            "out_proj",
            "NonDynamicallyQuantizableLinear",
        ),
    ],
    ids=["MultiheadAttention", "out_proj"],
)
def test_module_of_an_unsupported_type_is_refused_by_name_and_type(build, target, kind):
    with pytest.raises(ValueError, match=kind) as error:
        get_peft_model(build(), growing(target_modules=[target]))
    assert target in str(error.value)


def test_initial_ranks_follow_rank_pattern_and_init_r(make_bert, form):
    config = configure(form, init_r=2, rank_pattern={"layer.1.attention.self.query": 3, "value": 1})
    assert list(ranks_of(get_peft_model(make_bert(), config)).values()) == [2, 1, 3, 1]


@pytest.mark.parametrize("arguments", [{"r": 33, "init_r": 33}, {"rank_pattern": {"layer.1.*value": 33}}])
def test_rank_above_the_modules_size_is_refused_by_name(make_bert, arguments):
    with pytest.raises(ValueError, match=r"layer\.\d\.attention.*rank 33"):
        get_peft_model(make_bert(), configure("default", **arguments))


def test_alpha_pattern_sets_the_scale_of_a_grown_module(make_bert, grow, form):
    model = get_peft_model(make_bert(), configure(form, alpha_pattern={"value": 24}))
    grow(model, RANKS)
    alpha = {"query": 6, "value": 24}
    for name, layer in adapted_layers(model, "default").items():
        divisor = layer.r["default"] if form == "paper" else 3
        assert layer.scaling["default"] == pytest.approx(alpha[name.rsplit(".", 1)[-1]] / divisor)


SETTINGS = [
    {"alpha_pattern": {"value": 24}},
    {"use_rslora": True},
    {"layers_to_transform": [0, 1]},
    {"target_modules": r".*\.(query|value)"},
    {"modules_to_save": ["classifier"]},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"init_r": 1, "lora_dropout": 0.3},
]


@pytest.mark.parametrize("arguments", SETTINGS, ids=lambda arguments: next(iter(arguments)))
def test_setting_survives_saving_after_growth(make_bert, grow, tokens, tmp_path, form, arguments):
    model = get_peft_model(make_bert(), configure(form, **arguments))
    grow(model, RANKS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 0.3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


@pytest.mark.parametrize(
    ("bias", "pattern"),
    [("none", "nothing"), ("all", r"bias$"), ("lora_only", r"(query|value)\.base_layer\.bias$")],
)
def test_bias_makes_biases_trainable(make_bert, bias, pattern):
    model = get_peft_model(make_bert(), configure("default", bias=bias))
    biases = {name for name, _ in model.named_parameters() if re.search(r"bias$", name)}
    trainable = {name for name in biases if model.get_parameter(name).requires_grad}
    assert trainable == {name for name in biases if re.search(pattern, name)}


def test_module_to_save_is_trained_and_saved(make_bert, grow, tmp_path):
    model = get_peft_model(make_bert(), configure("default", modules_to_save=["classifier"]))
    grow(model, RANKS)
    model.save_pretrained(tmp_path)
    extra = [key for key in load_file(tmp_path / "adapter_model.safetensors") if "lora_" not in key]
    assert sorted(extra) == ["base_model.model.classifier.bias", "base_model.model.classifier.weight"]


# Training through real models.


def test_language_model_generates_with_a_grown_adapter(make_llama, grow, form):
    model = get_peft_model(make_llama(), configure(form, target_modules="all-linear", task_type="CAUSAL_LM"))
    grow(model)
    prompt = torch.tensor([[3, 4, 5]])
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    made = model.generate(
        input_ids=prompt, output_logits=True, return_dict_in_generate=True, eos_token_id=None, **arguments
    )
    assert made.sequences.shape == (1, 7)
    # Of its own choice a merged model would take another token where two are next to equal.
    wanted = model.merge_and_unload().eval()(made.sequences).logits[:, 2:-1]
    torch.testing.assert_close(torch.stack(made.logits, 1), wanted, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_the_model_gives_the_same_gradients(make_llama, grow, tokens, reentrant):
    collected = []
    for checkpointing in (False, True):
        config = configure("default", target_modules="all-linear", lora_dropout=0.2)
        model = get_peft_model(make_llama(), config)
        grow(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model.train()(tokens, labels=tokens).loss.backward()
        collected.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*collected, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


def test_optimizer_trains_what_grew(trained, tokens):
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for layer in adapted_layers(trained, "default").values():
        layer.structure.grow(layer, "default", 2, torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in parameters]
    trained(tokens, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


# The user's configuration.


def test_a_configuration_is_told_of_the_modules_as_peft_tells_it_and_serves_again(make_bert, grow, tmp_path):
    config = configure("default", target_modules=None)
    first = get_peft_model(make_bert(), config)
    assert config.target_modules == {"query", "value"}
    grow(first, RANKS)
    first.save_pretrained(tmp_path)
    assert not config.rank_pattern
    assert set(ranks_of(get_peft_model(make_bert(), config)).values()) == {1}


def test_a_configuration_to_load_with_is_the_models_own(saved, make_bert, form):
    config = IncreLoraConfig.from_pretrained(saved)
    assert PeftModel.from_pretrained(make_bert(), saved, config=config).peft_config["default"] is config


def test_a_layer_class_of_ones_own_is_refused_by_name():
    class Own(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"custom_modules=.*Own.* is not supported by IncreLoraConfig"):
        growing()._register_custom_module({nn.Linear: Own})


@pytest.mark.parametrize(
    ("task", "build", "head"),
    [
        ("TOKEN_CLS", AutoModelForTokenClassification, "classifier"),
        ("QUESTION_ANS", AutoModelForQuestionAnswering, "qa_outputs"),
        ("SEQ_CLS", AutoModelForSequenceClassification, "classifier"),
    ],
)
def test_the_head_of_a_task_is_trained_saved_and_loaded(bert_dir, tokens, tmp_path, task, build, head):
    def base():
        torch.manual_seed(1)
        return build.from_pretrained(bert_dir, num_labels=2, ignore_mismatched_sizes=True)

    config = configure("default", task_type=task)
    model = get_peft_model(base(), config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert trained == {f"base_model.model.{head}.modules_to_save.default.{p}" for p in ("weight", "bias")}
    with torch.no_grad():
        getattr(model.base_model.model, head).modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path)
    model.eval()
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])
        assert not torch.equal(loaded(tokens)[0], base().eval()(tokens)[0])
    again = get_peft_model(base(), config)
    assert {n for n, p in again.named_parameters() if p.requires_grad and ".lora_" not in n} == trained


def resized(embeddings):
    torch.manual_seed(embeddings)
    return nn.Sequential(OrderedDict(emb=nn.Embedding(embeddings, 8), lin=nn.Linear(8, 8)))


def test_sizes_that_do_not_fit_are_refused_or_left_out_as_asked(grow, tmp_path):
    model = get_peft_model(resized(20), growing(target_modules=["emb", "lin"], r=3))
    grow(model, {"emb": 2, "lin": 3})
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch: lora_A of module 'emb'.*\(2, 20\).*\(2, 25\)"):
        PeftModel.from_pretrained(resized(25), tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        loaded = PeftModel.from_pretrained(resized(25), tmp_path, ignore_mismatched_sizes=True)
    assert ranks_of(loaded) == {"emb": 2, "lin": 3}
    saved, found = model.state_dict(), loaded.state_dict()
    for name in ("lin.lora_A", "lin.lora_B", "lin.lora_E", "emb.lora_B", "emb.lora_E"):
        key = f"base_model.model.{name}.default.weight"
        assert torch.equal(found[key], saved[key])
