"""Exports of adapted experts and routers: plain PEFT gives the same outputs from its own layout for them."""

import warnings

import mixtures
import pytest
import torch
from adapted_experts import EXPERTS, MORE_TARGETS, TARGETS, adapted, layers_of
from increlora_rs import convert_lora, export_gguf, export_lora
from peft import PeftModel
from safetensors.torch import load_file
from test_export_experts import exported, reload_error

layouts = pytest.mark.parametrize("layout", ["uniform", "compact"])
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
PREFIX = "base_model.model.model.layers.1.mlp"


@pytest.fixture
def grown(grow):
    """``grown(name)``: the model with an adapter of ranks from 1 to 3."""

    def run(name, **config):
        model = adapted(name, **config)
        grow(model)
        return model

    return run


@layouts
@pytest.mark.parametrize("name", MORE_TARGETS)
def test_plain_peft_gives_the_same_outputs(grown, tmp_path, name, layout):
    model = grown(name, target_modules=["o_proj"])
    assert reload_error(name, exported(model, "directory", tmp_path, layout), model) < 1e-5


@pytest.mark.parametrize("targets", [["down_proj"], ["gate_up_proj"], ["mlp.gate.weight"]], ids=str)
@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral", "Qwen2Moe"])
def test_each_parameter_alone(grown, tmp_path, name, targets):
    model = grown(name, target_parameters=targets)
    assert reload_error(name, exported(model, "model", tmp_path), model) < 1e-5


@layouts
@pytest.mark.parametrize("name", ["Qwen3Moe", "Qwen2Moe"])
def test_beside_dense_layers_that_peft_takes_for_experts(grown, tmp_path, name, layout):
    model = grown(name, target_modules=["up_proj", "q_proj"])
    path = exported(model, "directory", tmp_path, layout)
    assert reload_error(name, path, model) < 1e-5


@layouts
@pytest.mark.parametrize(
    "arguments", [{"use_rslora": True}, {"alpha_pattern": {"down_proj": 24, "gate.weight": 2}}]
)
def test_scales_are_kept(grown, tmp_path, layout, arguments):
    model = grown("Qwen3Moe", **arguments)
    assert reload_error("Qwen3Moe", exported(model, "directory", tmp_path, layout), model) < 1e-5


def test_what_is_left_at_rank_0_has_no_part_in_it(grow, tmp_path):
    # All of one parameter, some experts of another, and a module.
    pattern = {"gate_up_proj": 0, r"down_proj\.[013]": 0, "o_proj": 0, "gate.weight": 1, r"down_proj\.2": 2}
    model = adapted("Qwen3Moe", target_modules=["o_proj", "q_proj"], rank_pattern=pattern)
    grow(model, {})
    path = exported(model, "directory", tmp_path)
    assert reload_error("Qwen3Moe", path, model) < 1e-5
    keys = load_file(path / "adapter_model.safetensors")
    assert not any("o_proj" in key or "base_layer" in key for key in keys)
    a = keys[f"{PREFIX}.experts.lora_A.weight"]
    assert [bool(rows.any()) for rows in a.chunk(4)] == [False, False, True, False]


def test_the_tensors_are_laid_out_expert_by_expert(grown, tmp_path):
    model = grown("Qwen3Moe")
    path = exported(model, "directory", tmp_path, "compact")
    found = load_file(path / "adapter_model.safetensors")
    a, b = (found[f"{PREFIX}.experts.base_layer.lora_{factor}.weight"] for factor in "AB")
    layers = [layers_of(model)[f"{GATE_UP}.{number}"] for number in range(4)]
    rank = max(layer.rank("default") for layer in layers)
    assert a.shape == (4 * rank, 32)
    assert b.shape == (32, 4 * rank)
    for number, layer in enumerate(layers):
        delta = b.view(32, rank, 4)[:, :, number] @ a.view(4, rank, 32)[number]
        torch.testing.assert_close(delta, layer.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-6)


def test_ranks_are_cut_to_the_nearest_update(grown, tmp_path):
    model = grown("Qwen3Moe")
    export = export_lora(model, tmp_path, rank=1)
    loaded = PeftModel.from_pretrained(mixtures.build("Qwen3Moe"), tmp_path)
    experts = loaded.base_model.model.model.layers[1].mlp.experts
    deltas = experts.base_layer.get_delta_weight("default").detach()
    for number in range(4):
        name = f"{GATE_UP}.{number}"
        wanted = layers_of(model)[name].get_delta_weight("default").detach().double()
        u, s, v = torch.linalg.svd(wanted)
        nearest = s[0] * u[:, :1] @ v[:1]
        torch.testing.assert_close(deltas[number].double(), nearest, rtol=0.0, atol=1e-5)
        lost = (wanted - nearest).norm() / wanted.norm()
        assert export.errors[name] == pytest.approx(float(lost), abs=1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_an_export_is_loaded_without_a_warning(grown, tmp_path, name):
    path = exported(grown(name), "directory", tmp_path)
    base = mixtures.build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        PeftModel.from_pretrained(base, path)


def test_other_formats_are_refused(grown, tmp_path):
    model = grown("DeepseekV3")
    with pytest.raises(ValueError, match=r"its class is DeepseekV3ForCausalLM.* was not tried"):
        export_gguf(model, mixtures.build("DeepseekV3"), tmp_path / "adapter.gguf")
    path = exported(model, "model", tmp_path)
    with pytest.raises(ValueError, match="trained with target_parameters"):
        convert_lora(path, tmp_path / "back")


def test_names_of_experts_are_those_that_were_given(grown, tmp_path):
    export = export_lora(grown("Qwen3Moe"), tmp_path)
    assert sorted(export.config.target_parameters) == sorted([*EXPERTS, "mlp.gate.weight"])
