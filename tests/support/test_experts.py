"""Mixtures of experts: what LoRA's configuration would have adapted, and IncreLoRA does not, is named."""

import warnings

import mixtures
import pytest
from growing import growing
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.experts import expert_layers, fused_parameters
from increlora_rs.support.names import short
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

# The last parameters of experts and routers in each architecture.
FUSED = {
    "DeepseekV3": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "Glm4Moe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "Qwen3Moe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "Qwen2Moe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "Mixtral": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "Olmoe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "GptOss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"],
    "Phimoe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"],
    "GraniteMoe": [
        "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.experts.down_proj",
        "block_sparse_moe.router.weight",
    ],
    "Jamba": [
        "feed_forward.experts.gate_up_proj",
        "feed_forward.experts.down_proj",
        "feed_forward.router.weight",
    ],
}
every_mixture = pytest.mark.parametrize("name", FUSED)
QWEN = ["q_proj", "gate_proj", "up_proj", "down_proj"]


def told(model, **arguments):
    """What is warned of when the model gets an adapter."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        get_peft_model(model, growing(r=2, **arguments))
    return [str(warning.message) for warning in found if warning.category is UserWarning]


@every_mixture
def test_all_linear_names_the_experts_and_routers_that_it_leaves_out(name):
    (message,) = told(mixtures.build(name), target_modules="all-linear")
    assert all(parameter in message for parameter in FUSED[name])


@every_mixture
def test_parameters_of_experts_and_routers_are_found(name):
    found = {".".join(p.full_name.split(".")[3:]) for p in fused_parameters(mixtures.build(name))}
    assert found == set(FUSED[name])


def dense_models(make_bert, make_llama, make_plain):
    small = {"num_layers": 1, "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
    return {
        "BERT": make_bert(),
        "Llama": make_llama(),
        "GPT-2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99)),
        "T5": T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, vocab_size=99)),
        # Tokens and positions of three dimensions.
        "ViT": ViTModel(ViTConfig(**small, intermediate_size=48, image_size=8, patch_size=4)),
        "plain": make_plain(),
    }


@pytest.mark.parametrize("kind", ["BERT", "Llama", "GPT-2", "T5", "ViT", "plain"])
def test_dense_models_are_not_warned_of(make_bert, make_llama, make_plain, kind):
    model = dense_models(make_bert, make_llama, make_plain)[kind]
    assert told(model, target_modules="all-linear") == []


@pytest.mark.parametrize("kind", ["BERT", "Llama", "GPT-2", "T5", "ViT", "plain"])
def test_dense_models_have_no_names_of_experts(make_bert, make_llama, make_plain, kind):
    assert expert_layers(dense_models(make_bert, make_llama, make_plain)[kind]) == {}


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("Qwen3Moe", QWEN),
        ("Qwen2Moe", QWEN),
        ("Glm4Moe", QWEN),
        ("DeepseekV3", QWEN[1:]),
        ("Olmoe", QWEN),
        ("Mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("Phimoe", ["q_proj", "w1", "w2", "w3"]),
        ("GptOss", ["q_proj", "gate_up_proj", "down_proj"]),
        ("Qwen3Moe", r".*\.(q|gate|up|down)_proj"),
        ("Qwen3Moe", r".*(q_proj|experts\.\d+\.(gate|down)_proj)"),
    ],
)
def test_targets_that_name_experts_name_what_is_left_out(name, targets):
    (message,) = told(mixtures.build(name), target_modules=targets)
    assert all(parameter in message for parameter in FUSED[name][:2])


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], ["q_proj", "shared_experts.up_proj"], r".*layers\.0\..*(up|down)_proj"],
    ids=str,
)
def test_targets_that_name_no_expert_are_not_warned_of(targets):
    assert told(mixtures.build("Glm4Moe"), target_modules=targets) == []


@pytest.mark.parametrize("option", ["exclude_modules", "modules_to_save"])
@pytest.mark.parametrize("targets", ["all-linear", QWEN], ids=["all", "list"])
def test_the_ways_out_that_the_warning_gives_end_it(option, targets):
    ways = {option: ["mlp.experts", "mlp.gate"]}
    assert told(mixtures.build("Glm4Moe"), target_modules=targets, **ways) == []


def test_layers_that_are_not_transformed_are_not_warned_of():
    assert told(mixtures.build("Glm4Moe"), target_modules=["up_proj"], layers_to_transform=[0]) == []


def test_targets_of_experts_alone_are_refused_by_their_parameters():
    with pytest.raises(ValueError, match=r"only fused experts, 'model.layers.0.mlp.experts.gate_up_proj'"):
        get_peft_model(mixtures.build("Mixtral"), growing(target_modules=["w1", "w3"]))


def test_a_mixture_of_ones_own_is_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(nn.init.normal_(nn.Linear(4, 12).weight.detach()).view(3, 4, 4))

        def forward(self, x):
            return x @ self.w.mean(0)

    model = nn.Sequential(nn.Linear(4, 4), Experts())
    (message,) = told(model, target_modules="all-linear")
    assert "1.w" in message


def test_a_second_adapter_of_the_same_kind_is_not_warned_of_again():
    model = mixtures.build("Mixtral")
    config = growing(r=2, target_modules="all-linear")
    with pytest.warns(UserWarning, match="experts and routers"):
        model = get_peft_model(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.add_adapter("other", growing(r=2, target_modules="all-linear"))


def test_an_adapter_that_is_loaded_for_inference_is_not_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="experts and routers"):
        model = get_peft_model(mixtures.build("Qwen3Moe"), growing(r=2, target_modules=QWEN))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(mixtures.build("Qwen3Moe"), tmp_path)


# Routers that are linear layers by their class, and give out a choice.


@pytest.fixture
def phimoe():
    with pytest.warns(UserWarning, match=r"mlp\.router\.weight"):
        return get_peft_model(
            mixtures.build("Phimoe"),
            growing(r=2, target_modules="all-linear", init_lora_weights=False),
        )


def test_all_linear_leaves_a_router_alone_that_gives_out_a_choice(phimoe):
    assert not any(name.endswith("router") for name in adapted_layers(phimoe, "default"))
    mixtures.logits(phimoe)


def test_a_saved_adapter_leaves_that_router_alone_too(phimoe, tmp_path):
    phimoe.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixtures.build("Phimoe"), tmp_path)
    assert adapted_layers(loaded, "default").keys() == adapted_layers(phimoe, "default").keys()


def test_such_a_router_is_refused_by_name():
    with pytest.raises(ValueError, match="PhimoeTopKRouter gives out a choice"):
        get_peft_model(mixtures.build("Phimoe"), growing(target_modules=["router"]))


# modules_to_save.


def test_experts_that_are_trained_as_a_whole_are_saved_and_loaded(tmp_path):
    ways = {"modules_to_save": ["mlp.experts", "mlp.gate"], "init_lora_weights": False}
    config = growing(r=2, target_modules="all-linear", **ways)
    model = get_peft_model(mixtures.build("DeepseekV3"), config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            nn.init.normal_(parameter, 0.0, 0.3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixtures.build("DeepseekV3"), tmp_path).eval()
    assert (mixtures.logits(loaded) - mixtures.logits(model)).abs().max() < 1e-5


def test_an_end_of_a_name_that_wraps_adapted_modules_is_refused():
    # PEFT would wrap shared_experts too, with what is adapted in them, and load nothing of it.
    config = growing(target_modules="all-linear", modules_to_save=["experts"])
    refused = pytest.raises(ValueError, match=r"modules_to_save: 'experts' is the end of .*shared_experts'")
    with pytest.warns(UserWarning, match="experts and routers that are parameters"), refused:
        get_peft_model(mixtures.build("DeepseekV3"), config)


def test_names_of_experts_are_kept_in_the_configuration():
    model = mixtures.build("Qwen3Moe")
    model = get_peft_model(model, growing(target_modules=["q_proj"]))
    assert model.peft_config["default"].expert_names == ["down_proj", "gate", "gate_proj", "up_proj"]
    assert [short(name) for name in adapted_layers(model, "default")] == [
        f"model.layers.{k}.self_attn.q_proj" for k in range(2)
    ]


def test_wrong_names_of_experts_are_refused():
    with pytest.raises(TypeError, match="expert_names"):
        growing(expert_names="up_proj")
