"""Exports of mixtures of experts: dense and shared layers are called as the experts are to PEFT."""

import json
import warnings

import consumers
import mixtures
import pytest
import torch
from growing import growing
from increlora_rs import convert_lora, export_lora
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

CONFIG = "adapter_config.json"
# With dense, shared and routed experts.
MIXED = ["DeepseekV3", "Glm4Moe", "Qwen3Moe", "Qwen2Moe"]
TARGETS = {
    "list": ["gate_proj", "up_proj", "down_proj"],
    "one": ["up_proj"],
    "full names": ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"],
    "all-linear": "all-linear",
    "regex": r".*(layers\.0|shared_experts?)\..*(o|gate|down)_proj",
}
layouts = pytest.mark.parametrize("layout", ["uniform", "compact"])
sources = pytest.mark.parametrize("source", ["model", "directory"])


@pytest.fixture
def grown(grow):
    """``grown(name, targets)``: the model with an adapter of ranks from 1 to 3 that changes its outputs."""

    def run(name, targets, **arguments):
        config = growing(**({"r": 3, "lora_alpha": 6, "target_modules": targets} | arguments))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = get_peft_model(mixtures.build(name), config).eval()
        layers = {short(name): layer for name, layer in adapted_layers(model, "default").items()}
        sizes = {name: min(layer.in_features, layer.out_features) for name, layer in layers.items()}
        grow(model, {name: min(1 + k % 3, size) for k, (name, size) in enumerate(sizes.items())})
        return model

    return run


def exported(model, source, tmp_path, *args, **kwargs):
    if source == "directory":
        model.save_pretrained(tmp_path / "adapter")
        model = tmp_path / "adapter"
    export_lora(model, tmp_path / "lora", *args, **kwargs)
    return tmp_path / "lora"


def reload_error(name, path, model):
    """How far the outputs are from the model's when plain PEFT has loaded the export; the effect it has."""
    loaded = PeftModel.from_pretrained(mixtures.build(name), path).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    wanted = mixtures.logits(model)
    effect = (wanted - mixtures.logits(mixtures.build(name))).abs().max().item()
    assert effect > 0.01
    return (mixtures.logits(loaded) - wanted).abs().max().item()


def without_names(path):
    """As an earlier version saved it: nothing is known of the base."""
    config = json.loads((path / CONFIG).read_text())
    del config["expert_names"]
    (path / CONFIG).write_text(json.dumps(config))


@layouts
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", MIXED)
def test_an_export_is_read_as_it_was_trained(grown, tmp_path, name, targets, layout):
    model = grown(name, targets)
    path = exported(model, "directory", tmp_path, layout)
    assert reload_error(name, path, model) < 1e-5


@pytest.mark.parametrize("name", [*MIXED, "Mixtral", "Olmoe", "GptOss", "Phimoe", "GraniteMoe", "Jamba"])
def test_an_export_of_a_model_in_memory_is_read_as_it_was_trained(grown, tmp_path, name):
    model = grown(name, "all-linear")
    assert reload_error(name, exported(model, "model", tmp_path), model) < 1e-5


@pytest.mark.parametrize("arguments", [{"use_rslora": True}, {"alpha_pattern": {"up_proj": 24, "o_proj": 2}}])
@layouts
def test_scales_of_such_layers_are_kept(grown, tmp_path, layout, arguments):
    model = grown("Glm4Moe", "all-linear", **arguments)
    assert reload_error("Glm4Moe", exported(model, "directory", tmp_path, layout), model) < 1e-5


@layouts
def test_such_layers_are_cut_to_the_nearest_update(grown, tmp_path, layout):
    model = grown("Qwen3Moe", ["up_proj", "o_proj"])
    path = exported(model, "directory", tmp_path, layout, rank=1)
    loaded = PeftModel.from_pretrained(mixtures.build("Qwen3Moe"), path)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    wanted = adapted_layers(model, "default")[name].get_delta_weight("default").double()
    u, s, v = torch.linalg.svd(wanted)
    nearest = s[0] * u[:, :1] @ v[:1]
    found = loaded.get_submodule(name).get_delta_weight("default").double()
    torch.testing.assert_close(found, nearest, rtol=0.0, atol=1e-5)


def test_the_uniform_export_is_loaded_without_a_warning(grown, tmp_path):
    path = exported(grown("Glm4Moe", TARGETS["list"]), "directory", tmp_path)
    base = mixtures.build("Glm4Moe")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        PeftModel.from_pretrained(base, path)


@pytest.mark.parametrize("read", [lambda path: consumers.vllm(path, 8), consumers.tgi, consumers.llama_cpp])
def test_servers_find_every_update_under_its_modules_name(grown, tmp_path, read):
    model = grown("Glm4Moe", "all-linear")
    found = read(exported(model, "model", tmp_path))
    layers = {short(name): layer for name, layer in adapted_layers(model, "default").items()}
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        wanted = layer.get_delta_weight("default").double()
        torch.testing.assert_close(found[name], wanted, rtol=0.0, atol=1e-5)


def test_a_dense_model_is_exported_by_its_targets_alone(grown, tmp_path):
    export = export_lora(grown("Llama", ["up_proj", "q_proj"]), tmp_path)
    assert (export.config.target_modules, export.config.target_parameters) == ({"q_proj", "up_proj"}, None)


def test_experts_trained_as_a_whole_are_exported(grown, tmp_path):
    model = grown("Qwen3Moe", "all-linear", modules_to_save=["mlp.experts", "mlp.gate"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    assert reload_error("Qwen3Moe", exported(model, "directory", tmp_path), model) < 1e-5


def test_our_own_directory_is_read_as_it_was_trained(grown, tmp_path):
    model = grown("Qwen3Moe", "all-linear")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixtures.build("Qwen3Moe"), tmp_path).eval()
    torch.testing.assert_close(mixtures.logits(loaded), mixtures.logits(model), rtol=0.0, atol=1e-6)


def test_transformers_loads_our_own_directory_as_it_was_trained(grown, tmp_path):
    model = grown("Qwen3Moe", "all-linear")
    model.save_pretrained(tmp_path)
    loaded = mixtures.build("Qwen3Moe")
    loaded.load_adapter(str(tmp_path))
    torch.testing.assert_close(mixtures.logits(loaded.eval()), mixtures.logits(model), rtol=0.0, atol=1e-6)


# Adapters of earlier versions, which say nothing of their base model.


def test_an_earlier_adapter_beside_experts_is_read_as_it_was_trained(grown, tmp_path):
    model = grown("Glm4Moe", TARGETS["list"])
    model.save_pretrained(tmp_path / "adapter")
    without_names(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert reload_error("Glm4Moe", tmp_path / "lora", model) < 1e-5


def test_an_earlier_adapter_is_exported_by_its_bases_configuration(grown, tmp_path):
    model = grown("Qwen3Moe", TARGETS["list"])
    mixtures.build("Qwen3Moe").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    without_names(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert reload_error("Qwen3Moe", tmp_path / "lora", model) < 1e-5


@pytest.mark.parametrize("name", ["Qwen3Moe", "Llama"])
def test_an_earlier_adapter_of_an_unknown_base_is_warned_of(grown, tmp_path, name):
    grown(name, TARGETS["list"]).save_pretrained(tmp_path / "adapter")
    without_names(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"does not say what its base model is.*'gate_proj'"):
        export_lora(tmp_path / "adapter", tmp_path / "lora")


def test_an_earlier_adapter_with_other_names_is_not_warned_of(grown, tmp_path):
    grown("Qwen3Moe", ["q_proj", "o_proj"]).save_pretrained(tmp_path / "adapter")
    without_names(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_lora(tmp_path / "adapter", tmp_path / "lora")


# And back.


@layouts
@sources
def test_such_an_export_is_converted_back(grown, tmp_path, layout, source):
    model = grown("Glm4Moe", "all-linear")
    path = exported(model, "model", tmp_path, layout)
    lora = PeftModel.from_pretrained(mixtures.build("Glm4Moe"), path) if source == "model" else path
    convert_lora(lora, tmp_path / "again")
    loaded = PeftModel.from_pretrained(mixtures.build("Glm4Moe"), tmp_path / "again").eval()
    assert (mixtures.logits(loaded) - mixtures.logits(model)).abs().max() < 1e-5


def lora_of(name, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(mixtures.build(name), LoraConfig(r=2, **arguments))


def saved(model, source, tmp_path):
    if source == "model":
        return model
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@sources
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Qwen3Moe", {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
        ("Mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
        ("Mixtral", {"target_modules": "all-linear"}),
        ("GptOss", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
        ("GptOss", {"target_modules": [], "target_parameters": ["model.layers.0.mlp.experts.down_proj"]}),
    ],
)
def test_a_lora_of_experts_is_refused_by_its_configuration(tmp_path, source, name, arguments):
    lora = saved(lora_of(name, **arguments), source, tmp_path)
    with pytest.raises(ValueError, match=r"trained with target_parameters=.*proj.*merge_and_unload"):
        convert_lora(lora, tmp_path / "adapter")


@sources
def test_a_lora_beside_the_experts_is_converted(tmp_path, source):
    # PEFT leaves an empty set of target_parameters in its configuration.
    model = lora_of("Qwen3Moe", target_modules=["q_proj", "o_proj"], init_lora_weights=False).eval()
    convert_lora(saved(model, source, tmp_path), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(mixtures.build("Qwen3Moe"), tmp_path / "adapter").eval()
    assert (mixtures.logits(loaded) - mixtures.logits(model)).abs().max() < 1e-5


@sources
def test_options_are_judged_before_damaged_tensors(tmp_path, source):
    model = lora_of("Llama", target_modules=["q_proj"], lora_bias=True)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.lora_A["default"].weight.data = torch.zeros(7, 32)
    with pytest.raises(ValueError, match="lora_bias=True"):
        convert_lora(saved(model, source, tmp_path), tmp_path / "adapter")


def test_the_tensors_of_such_an_export_have_the_modules_names(grown, tmp_path):
    model = grown("Qwen2Moe", ["up_proj"])
    keys = load_file(exported(model, "model", tmp_path) / "adapter_model.safetensors")
    modules = [f"model.layers.{name}.up_proj" for name in ("0.mlp", "1.mlp.shared_expert")]
    assert keys.keys() == {f"base_model.model.{m}.lora_{f}.weight" for m in modules for f in "AB"}
