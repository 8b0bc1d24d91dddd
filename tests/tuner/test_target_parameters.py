"""``target_parameters`` as the configuration takes it: names, patterns, refusals; saved and loaded."""

import json
import re
import warnings

import mixtures
import pytest
import torch
from adapted_experts import MORE_TARGETS, TARGETS, adapted, layers_of, tokens_of, train
from growing import growing
from increlora_rs import IncreLoraConfig, adapter_parameters, attach, rank_table
from increlora_rs.layers import AdaptedLayer
from increlora_rs.layers.room import make_room
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


def names_of(model):
    return [name for name, _ in model.peft_config["default"].adapted_parameters]


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["experts.down_proj"], [DOWN]),
        (["down_proj"], [DOWN]),
        ([GATE_UP], [GATE_UP]),
        (["model.layers.1.mlp.gate.weight"], ["model.layers.1.mlp.gate.weight"]),
    ],
)
def test_names_are_full_names_or_ends_of_such(targets, found):
    assert names_of(adapted("Qwen3Moe", target_parameters=targets)) == found


@pytest.mark.parametrize("name", MORE_TARGETS)
def test_the_parameters_are_those_that_peft_adapts(name):
    ours = names_of(adapted(name))
    lora = get_peft_model(
        mixtures.build(name), LoraConfig(target_modules=[], target_parameters=MORE_TARGETS[name])
    )
    assert ours == lora.targeted_parameter_names


def test_modules_and_parameters_are_adapted_together():
    model = adapted("Qwen3Moe", target_modules=["q_proj", "up_proj"], target_parameters=["down_proj"])
    ends = {re.sub(r"\d+", "*", name).removeprefix("model.layers.*.") for name in layers_of(model)}
    assert ends == {"self_attn.q_proj", "mlp.up_proj", "mlp.experts.down_proj.*"}


@pytest.mark.parametrize(
    ("name", "parameter"), [("Mixtral", "experts.down_proj"), ("Llama", "down_proj.weight")]
)
def test_target_modules_left_out_are_those_that_peft_takes(name, parameter):
    # Those of the type of the model, and of a mixture none.
    config = {"target_parameters": [parameter]}
    ours = layers_of(get_peft_model(mixtures.build(name), growing(**config)))
    lora = get_peft_model(mixtures.build(name), LoraConfig(**config))
    assert lora.targeted_module_names == [one for one in ours if "self_attn" in one]


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (["experts.up_proj"], r"\['experts.up_proj'\] are the names of no parameter.*experts\.gate_up_proj"),
        (["down_proj", "nothing"], r"target_parameters: \['nothing'\]"),
        (["gate"], r"target_parameters: \['gate'\]"),
        (["q_norm.weight"], r"q_norm\.weight: it has the shape \(8,\)"),
    ],
)
def test_names_of_nothing_that_can_be_adapted_are_refused(targets, told):
    with pytest.raises(ValueError, match=told):
        adapted("Qwen3Moe", target_parameters=targets)


def test_the_weight_of_a_layer_that_is_adapted_is_refused():
    with pytest.raises(
        ValueError, match=r"'model.layers.0.self_attn.q_proj.weight' is the parameter of a lay"
    ):
        adapted("Qwen3Moe", target_modules=["q_proj"], target_parameters=["q_proj.weight"])


def test_a_layer_whose_weight_is_adapted_is_refused():
    model = adapted("Llama", target_parameters=["q_proj.weight"])
    with pytest.raises(ValueError, match="in target_parameters already"):
        model.add_adapter("other", growing(target_modules=r".*q_proj\.base_layer"))


def test_a_parameter_of_the_model_itself_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.ones(3, 3))

    with pytest.raises(ValueError, match="a parameter of the model itself"):
        get_peft_model(Model(), growing(target_modules=[], target_parameters=["matrix"]))


@pytest.mark.parametrize(
    ("option", "value"),
    [("lora_dropout", 0.1), ("use_dora", True), ("fan_in_fan_out", True), ("growth", "capacity")],
)
def test_what_is_not_for_parameters_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=rf"^{option}=.*target_parameters=\['down_proj'\]"):
        IncreLoraConfig(target_parameters=["down_proj"], **{option: value})


def test_names_that_are_no_list_are_refused():
    with pytest.raises(TypeError, match="target_parameters='down_proj' must be a list of strings"):
        IncreLoraConfig(target_parameters="down_proj")
    with pytest.raises(TypeError, match="adapted_parameters"):
        IncreLoraConfig(adapted_parameters=[["name", "many"]])


def test_the_capacity_form_is_refused_also_where_a_trainer_asks_for_it():
    with pytest.raises(ValueError, match="growth='capacity' is not supported with target_parameters"):
        make_room(adapted("Qwen3Moe"), "default")


def test_parameters_that_are_trained_as_a_whole_are_refused():
    with pytest.raises(ValueError, match=r"modules_to_save: 'mlp\.experts' is the end of"):
        adapted("Qwen3Moe", modules_to_save=["mlp.experts"])


def test_experts_that_are_no_plain_tensor_are_refused():
    base = mixtures.build("Qwen3Moe")
    experts = base.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"down_proj: it is of type Parameter, dtype torch.int8, quantised"):
        get_peft_model(base, growing(target_modules=[], target_parameters=["experts.down_proj"]))


def test_adapters_mixed_in_one_batch_are_refused():
    model = adapted("Qwen3Moe")
    with pytest.raises(ValueError, match="adapter_names: adapters cannot be mixed"):
        model(input_ids=tokens_of(0), adapter_names=["default", "__base__"])


def test_a_weighted_sum_is_refused():
    model = adapted("Qwen3Moe")
    with pytest.raises(ValueError, match="'default' has target_parameters"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


# Warnings.


@pytest.mark.parametrize("name", TARGETS)
def test_all_linear_is_not_warned_of_experts_that_target_parameters_names(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted(name, target_modules="all-linear")


def test_all_linear_leaves_out_a_router_whose_weight_is_adapted():
    model = adapted("Phimoe", target_modules="all-linear")
    assert "model.layers.0.mlp.router.weight" in layers_of(model)
    mixtures.logits(model)


def test_the_way_that_the_warning_names_ends_it():
    with pytest.warns(UserWarning, match="experts and routers") as told:
        get_peft_model(mixtures.build("GptOss"), growing(target_modules="all-linear"))
    (message,) = (str(one.message) for one in told if "experts and routers" in str(one.message))
    names = json.loads(re.search(r"target_parameters=(\[[^]]*\])", message)[1].replace("'", '"'))
    assert names == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.router.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted("GptOss", target_modules="all-linear", target_parameters=names)


# Ranks.


def test_the_budget_counts_the_parameters_of_experts():
    model = adapted("Qwen3Moe", make=IncreLoraConfig, r=3)
    layers = layers_of(model).values()
    sizes = [layer.out_features + layer.in_features + 1 for layer in layers]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    scheduler = attach(model, optimizer, total_steps=10)
    assert scheduler.budget == 3 * sum(sizes)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * sum(sizes)


@pytest.mark.parametrize(
    ("pattern", "ranks"),
    [
        ({"gate_up_proj": 3}, [3, 3, 3, 3]),
        ({r"gate_up_proj\.2": 4}, [1, 1, 4, 1]),
        ({r"gate_up_proj\.[02]": 0, "experts.gate_up_proj": 2}, [0, 2, 0, 2]),
        ({"experts": 5}, [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_patterns_are_of_parameters_or_of_experts(pattern, ranks):
    told = (
        pytest.warns(RuntimeWarning, match="rank_pattern")
        if "experts" in pattern
        else warnings.catch_warnings()
    )
    with told:
        model = adapted("Qwen3Moe", target_parameters=["gate_up_proj"], rank_pattern=pattern)
    layers = layers_of(model)
    assert [layers[f"{GATE_UP}.{number}"].rank("default") for number in range(4)] == ranks


def test_alphas_are_kept_by_a_saved_adapter(grow, tmp_path):
    model = adapted("Qwen3Moe", alpha_pattern={"down_proj": 64, r"gate_up_proj\.1": 8})
    grow(model)
    wanted = mixtures.logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixtures.build("Qwen3Moe"), tmp_path).eval()
    assert torch.equal(mixtures.logits(loaded), wanted)


def test_tables_have_every_expert(grow):
    model = adapted("Qwen3Moe")
    ranks = grow(model)
    table = rank_table(model)
    assert sum(ranks.values()) == table.total_rank
    assert table.ranks["1", "down_proj.3"] == ranks[f"{DOWN}.3"]


# Saving and loading.


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", MORE_TARGETS)
def test_a_saved_adapter_is_loaded_bit_for_bit_and_without_a_warning(grow, tmp_path, name, low):
    model = adapted(name, target_modules=["o_proj"])
    grow(model)
    model.save_pretrained(tmp_path)
    base = mixtures.build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low).eval()
    assert torch.equal(mixtures.logits(loaded), mixtures.logits(model))


def test_an_adapter_is_loaded_over_one_of_other_ranks(grow):
    model, other = adapted("Mixtral"), adapted("Mixtral")
    grow(model)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(mixtures.logits(other), mixtures.logits(model))


def test_an_adapter_of_fewer_experts_is_refused(grow, tmp_path):
    model = adapted("Qwen3Moe")
    model.save_pretrained(tmp_path)
    config = mixtures.build("Qwen3Moe").config
    config.num_experts = 6
    base = type(mixtures.build("Qwen3Moe"))(config)
    with pytest.raises(ValueError, match=r"no tensor .*gate_up_proj\.4"):
        PeftModel.from_pretrained(base, tmp_path)


def test_training_goes_on_with_a_loaded_adapter(tmp_path):
    model = adapted("Qwen3Moe")
    train(model, 6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixtures.build("Qwen3Moe"), tmp_path, is_trainable=True)
    train(loaded, 4)
    assert not torch.equal(mixtures.logits(loaded), mixtures.logits(model))


def test_what_stays_whole_in_a_sharded_base_is_the_adapter_alone():
    model = adapted("Qwen3Moe")
    ours = {p for layer in model.modules() if isinstance(layer, AdaptedLayer) for p in layer.parameters()}
    assert adapter_parameters(model) == ours
