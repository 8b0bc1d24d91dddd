"""What PEFT refuses for LoRA, by the name of the method or the type of a layer, is refused here too."""

import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraConfig
from increlora_rs.methods.lora_mini import LoraMiniConfig
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

SMALL = {"vocab_size": 30, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
MAMBAS = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL)),
    "falcon_mamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(**SMALL)),
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**SMALL, num_heads=4, head_dim=8, n_groups=2)),
}


@pytest.fixture
def adapted(make_plain):
    return get_peft_model(make_plain(), growing(r=2, target_modules=["lin0", "lin1"]))


# Told beside it, of x_proj and dt_proj.
@pytest.mark.filterwarnings("ignore:.*with kernels of its own:UserWarning")
@pytest.mark.parametrize("targets", [["in_proj", "out_proj"], ["conv1d"], "all-linear"])
@pytest.mark.parametrize("name", MAMBAS)
def test_a_module_of_mamba_that_stops_lora_is_refused(name, targets):
    told = []
    for config in (LoraConfig, IncreLoraConfig):
        with pytest.raises(ValueError, match="is incompatible with Mamba-based models") as error:
            get_peft_model(MAMBAS[name](), config(r=2, target_modules=targets))
        told.append(str(error.value).split("Incompatible modules")[0])
    assert told[0] == told[1]


def test_a_module_of_mamba_that_lora_adapts_is_adapted():
    with pytest.warns(UserWarning, match="reads the weight of its x_proj"):
        model = get_peft_model(MAMBAS["mamba"](), growing(r=2, target_modules=["in_proj", "x_proj"]))
    assert model.peft_config["default"].peft_type == "INCRELORA"


def test_a_base_that_is_split_over_processes_is_refused(make_plain):
    base = make_plain()
    base.lin1._hf_tp_plan = "colwise"
    with pytest.raises(ValueError, match=r"lin1: its weight is split over processes .*'colwise'"):
        get_peft_model(base, growing(r=2, target_modules=["lin0", "lin1"]))


def test_the_oldest_peft_has_one_mark_of_such_a_base(make_plain, monkeypatch):
    # 0.21.0 has no function that looks for the other.
    monkeypatch.setattr("increlora_rs.tuner.checks.get_tp_plan_and_mesh", None)
    base = make_plain()
    get_peft_model(base, growing(r=2, target_modules=["lin0"]))
    base.lin1._hf_tp_plan = "colwise"
    with pytest.raises(ValueError, match=r"lin1: its weight is split over processes .*'colwise'"):
        get_peft_model(base, growing(r=2, target_modules=["lin1"]))


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_saving_parts_of_a_parameter_is_refused_by_module(adapted, tmp_path, factor):
    for name, parameter in adapted.named_parameters():
        if f"lin1.{factor}" in name:
            parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"module 'lin1' cannot be saved: .*Gather the parameters"):
        adapted.save_pretrained(tmp_path)


def test_saving_parts_of_a_parameter_of_any_method_is_refused(make_plain, tmp_path):
    model = get_peft_model(make_plain(), LoraMiniConfig(r=2, target_modules=["lin1"]))
    model.base_model.model.lin1.lora_B["default"].weight.data = torch.zeros(32)
    with pytest.raises(ValueError, match=r"module 'lin1' cannot be saved: .*Gather the parameters"):
        model.save_pretrained(tmp_path)


def test_a_layer_says_of_which_method_it_is(make_plain):
    model = get_peft_model(make_plain(), LoraMiniConfig(r=2, target_modules=["lin1"]))
    assert repr(model.base_model.model.lin1).startswith("lora_mini.Linear(")


def test_saving_gathered_parameters_goes_on(adapted, tmp_path):
    whole = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    wanted = get_peft_model_state_dict(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.empty(0)
    saved = get_peft_model_state_dict(adapted, state_dict=whole)
    assert saved.keys() == wanted.keys()


def test_making_ready_for_hot_swapping_is_refused(adapted):
    with pytest.raises(ValueError, match=r"'default' is a number, not a tensor .*export_lora"):
        prepare_model_for_compiled_hotswap(adapted, target_rank=4)


def test_conversion_to_an_initial_model_is_refused(adapted, tmp_path):
    adapted.save_pretrained(tmp_path / "first")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion is for LoRA that changes"):
        adapted.save_pretrained(
            tmp_path / "last", path_initial_model_for_weight_conversion=str(tmp_path / "first")
        )


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda model, path: hotswap_adapter(model, path, "default"), "Hotswapping only supports LORA"),
        (lambda model, path: reduce_intruder_dimension(model), "is not using LoRA"),
        (
            lambda model, path: get_peft_model(
                nn.Sequential(nn.Linear(4, 4)), growing(target_modules=["0"]), mixed=True
            ),
            "is not compatible with the `PeftMixedModel`",
        ),
    ],
    ids=["hotswap", "intruders", "mixed"],
)
def test_what_is_for_lora_alone_says_so(adapted, tmp_path, use, message):
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        use(adapted, str(tmp_path))


def test_a_rescaled_adapter_scales_its_update_and_comes_back(adapted):
    for name, parameter in adapted.named_parameters():
        if "lin1.lora_B" in name:
            nn.init.normal_(parameter)
    x = torch.randn(3, 12)
    whole = adapted(x)
    with adapted.disable_adapter():
        base = adapted(x)
    with rescale_adapter_scale(adapted, 0.5):
        torch.testing.assert_close(adapted(x), base + 0.5 * (whole - base))
    torch.testing.assert_close(adapted(x), whole)
