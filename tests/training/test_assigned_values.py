"""Values given to parameters by assignment: sizes are read off the tensors, or a save refuses."""

import copy

import pytest
import torch
from growing import growing
from increlora_rs.layers.found import adapted_layers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

FORMS = pytest.mark.parametrize("options", [{}, {"scaling": "rank"}, {"scaling": "rank", "use_rslora": True}])


@pytest.fixture
def pair(make_plain, grow):
    """``pair(options)``: a model of ranks 3 and 2, and one that was copied before they grew."""

    def build(options):
        config = growing(r=3, lora_alpha=6, target_modules=["lin0", "lin1"], **options)
        model = get_peft_model(make_plain(), config)
        other = copy.deepcopy(model)
        grow(model, {"lin0": 3, "lin1": 2})
        return model, other

    return build


def assign(other, model):
    for to, of in zip(other.parameters(), model.parameters(), strict=True):
        to.data = of.data.clone()


@FORMS
def test_assigned_values_give_the_same_output(pair, plain_input, options):
    model, other = pair(options)
    assign(other, model)
    assert torch.equal(other(plain_input), model(plain_input))


@FORMS
def test_assigned_values_are_saved_and_loaded(pair, make_plain, plain_input, options, tmp_path):
    model, other = pair(options)
    assign(other, model)
    other.save_pretrained(tmp_path)
    assert other.peft_config["default"].rank_pattern == {"^lin0": 3, "^lin1": 2}
    loaded = PeftModel.from_pretrained(make_plain(), tmp_path)
    torch.testing.assert_close(loaded(plain_input), model(plain_input))


@FORMS
def test_assigned_values_are_merged(pair, plain_input, options):
    model, other = pair(options)
    assign(other, model)
    torch.testing.assert_close(other.merge_and_unload()(plain_input), model(plain_input))


@pytest.mark.parametrize("factor", range(3))
def test_a_save_of_factors_of_unlike_ranks_raises_and_leaves_the_old_file(pair, factor, tmp_path):
    model, other = pair({})
    other.save_pretrained(tmp_path)
    before = load_file(tmp_path / "adapter_model.safetensors")
    layers = adapted_layers(other, "default").values(), adapted_layers(model, "default").values()
    for to, of in zip(*layers, strict=True):
        to.factors("default")[factor].data = of.factors("default")[factor].data.clone()
    with pytest.raises(ValueError, match=r"module 'lin0' has lora_A of shape .* so nothing was saved"):
        other.save_pretrained(tmp_path)
    after = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(after[key], before[key]) for key in before)
