"""Names of experts and routers before they were fused: those of the checkpoints that Transformers writes."""

import re

import mixtures
import pytest
from adapted_experts import MORE_TARGETS, adapted
from growing import growing
from increlora_rs.support.unfused import layers_by_parameter, unfused_layers, unfused_layers_of_base
from safetensors.torch import load_file

SEPARATE = ["Qwen3Moe", "Qwen2Moe", "Mixtral", "DeepseekV3", "Phimoe", "Glm4Moe", "Olmoe", "Jamba"]


def parameters_of(model):
    """Those of experts and routers, with the number of experts in each."""
    return {
        name: len(tensor) if tensor.dim() == 3 else 0
        for name, tensor in model.named_parameters()
        if tensor.dim() == 3 or re.search(r"\.(gate|router)\.weight$", name)
    }


@pytest.mark.parametrize("name", SEPARATE)
def test_names_are_those_of_the_models_checkpoints(tmp_path, name):
    model = mixtures.build(name)
    parameters = parameters_of(model)
    table = unfused_layers(model, parameters)
    found = set()
    for parameter, count in parameters.items():
        module, _, own = parameter.rpartition(".")
        for layer in layers_by_parameter(table, module)[own]:
            found |= {f"{layer.replace('*', str(number))}.weight" for number in range(count or 1)}
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors")
    saved = {key for key in keys if re.search(r"\.experts\.\d|\.(gate|router)\.weight$", key)}
    assert found == saved


@pytest.mark.parametrize("name", ["GptOss", "GraniteMoe"])
def test_experts_that_were_never_separate_have_no_names(name):
    model = mixtures.build(name)
    table = unfused_layers(model, parameters_of(model))
    assert not any("expert" in key for key in table)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_a_bases_configuration_gives_the_models_names(tmp_path, name):
    model = mixtures.build(name)
    model.config.save_pretrained(tmp_path)
    parameters = parameters_of(model)
    assert unfused_layers_of_base(str(tmp_path), parameters) == unfused_layers(model, parameters)
    assert unfused_layers_of_base(str(tmp_path / "nothing"), parameters) is None


@pytest.mark.parametrize("name", MORE_TARGETS)
def test_names_are_kept_in_the_configuration(name):
    model = adapted(name)
    config = model.peft_config["default"]
    assert config.unfused_layers == unfused_layers(mixtures.build(name), dict(config.adapted_parameters))


def test_wrong_names_are_refused():
    with pytest.raises(TypeError, match="unfused_layers"):
        growing(unfused_layers=["up_proj"])
    with pytest.raises(TypeError, match="unfused_layers"):
        growing(unfused_layers={"mlp.experts.down_proj": "down_proj"})
