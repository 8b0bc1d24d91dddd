"""A module that would read an adapted layer's weight instead of calling it is made to call it, or refused."""

import copy
import warnings

import pytest
import torch
from growing import growing
from increlora_rs.training.modules import adapted_modules
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import MambaConfig, MambaModel, WavLMConfig, WavLMModel

pytestmark = pytest.mark.filterwarnings("ignore:.*fast path is off", "ignore:.*nested tensors")
_SETTINGS = {"dropout": 0.0, "batch_first": True}
_KEEP = torch.tensor([[True, True, True, False], [True, True, False, False]])


def _layer(**options):
    return nn.TransformerEncoderLayer(8, 2, 8, **(_SETTINGS | options))


def _encoder(**options):
    return nn.TransformerEncoder(_layer(**options), 2)


class Model(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = {"layer": _layer, "encoder": _encoder}[kind](**options)

    def forward(self, x, **kwargs):
        return self.body(x, **kwargs)


def _adapted(kind, targets=("linear1", "linear2"), **options):
    model = get_peft_model(Model(kind, **options), growing(r=2, lora_alpha=2, target_modules=list(targets)))
    torch.manual_seed(1)
    with torch.no_grad():
        for module in adapted_modules(model, "default"):
            for factor, _, _ in module.parameters:
                factor.normal_()
    return model


@pytest.fixture
def x():
    return torch.randn(2, 4, 8)


def _kept(output):
    return output[_KEEP]


def _output(model, x, mask=True):
    return _kept(model(x, src_key_padding_mask=~_KEEP)) if mask else model(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mask", [True, False], ids=["padding", "no_padding"])
@pytest.mark.parametrize("targets", [("linear1",), ("linear2",), ("layers.1.linear1",)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_in_evaluation_is_the_one_in_training(x, mode, mask, targets, activation):
    model = _adapted("encoder", targets, activation=activation)
    expected = _output(model.train(), x, mask).detach()
    with mode():
        torch.testing.assert_close(_output(model.eval(), x, mask), expected)


def test_a_single_layer_in_evaluation_is_the_one_in_training(x):
    model = _adapted("layer")
    expected = model.train()(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)


@torch.no_grad()
def test_a_disabled_adapter_gives_the_bases_output(x):
    base, model = Model("encoder").eval(), _adapted("encoder").eval()
    with model.disable_adapter():
        torch.testing.assert_close(_output(model, x), _output(base, x))


@torch.no_grad()
def test_a_loaded_adapter_and_a_copy_give_the_same_output(x, tmp_path):
    model = _adapted("encoder").eval()
    expected = _output(model, x)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(_output(PeftModel.from_pretrained(Model("encoder"), tmp_path), x), expected)
    torch.testing.assert_close(_output(copy.deepcopy(model), x), expected)


@torch.no_grad()
def test_merged_weights_give_the_same_output(x):
    model = _adapted("encoder").eval()
    expected = _output(model, x)
    model.merge_adapter()
    torch.testing.assert_close(_output(model, x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_unloaded_encoder_has_its_fast_path_again(x):
    merged = _adapted("encoder").merge_and_unload()
    found = [(m.activation_relu_or_gelu) for m in merged.modules() if hasattr(m, "activation_relu_or_gelu")]
    assert (found, merged.body.use_nested_tensor) == ([1, 1], True)


def test_the_fast_path_that_is_switched_off_is_told_once():
    with pytest.warns(UserWarning, match="2 torch.nn.TransformerEncoderLayer read the weights"):
        model = _adapted("encoder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("other", growing(r=2, target_modules=["linear1"]))


def test_an_encoder_in_which_nothing_it_reads_is_adapted_keeps_its_fast_path():
    class Headed(Model):
        def __init__(self):
            super().__init__("encoder")
            self.head = nn.Linear(8, 8)

    model = get_peft_model(Headed(), growing(r=2, target_modules=["head"]))
    assert model.base_model.model.body.use_nested_tensor


def test_a_decoder_in_evaluation_is_the_one_in_training(x):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.TransformerDecoderLayer(8, 2, 8, **_SETTINGS)

        def forward(self, x):
            return self.body(x, x)

    model = get_peft_model(Decoder(), growing(r=2, target_modules=["linear1", "linear2"]))
    with torch.no_grad():
        for module in adapted_modules(model, "default"):
            module.factors[1].normal_()
        torch.testing.assert_close(model.eval()(x), model.train()(x))


@pytest.mark.parametrize("own", [False, True], ids=["torchs", "replaced"])
def test_the_output_projection_of_attention_is_refused_by_name(own):
    net = nn.Sequential(nn.MultiheadAttention(8, 2))
    if own:
        net[0].out_proj = nn.Linear(8, 8)
    with pytest.raises(
        ValueError, match=r"0\.out_proj: a MultiheadAttention reads the weight of its out_proj"
    ):
        get_peft_model(net, growing(r=2, target_modules=["out_proj"]))


@pytest.mark.parametrize("name", ["q_proj", "out_proj"])
def test_attention_that_reads_its_projections_is_refused_by_name(name):
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,),
        conv_kernel=(3,),
        conv_stride=(2,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    with pytest.raises(ValueError, match=f"a WavLMAttention reads the weight of its {name} .Linear. without"):
        get_peft_model(WavLMModel(config), growing(r=2, target_modules=[name]))


@pytest.fixture
def mamba():
    config = MambaConfig(vocab_size=20, hidden_size=8, state_size=4, num_hidden_layers=1, time_step_rank=4)
    return MambaModel(config)


def test_the_output_of_a_mamba_mixer_is_refused_by_name(mamba):
    # Of a whole model of Transformers PEFT refuses it before, by the model's configuration.
    mixer = nn.Sequential(mamba.layers[0].mixer)
    with pytest.raises(ValueError, match="a MambaMixer reads the weight of its out_proj"):
        get_peft_model(mixer, growing(r=2, target_modules=["out_proj"]))


def test_what_the_kernels_of_a_mamba_mixer_read_is_told(mamba):
    with pytest.warns(
        UserWarning, match="a MambaMixer with kernels of its own reads the weight of its x_proj"
    ):
        get_peft_model(mamba, growing(r=2, target_modules=["x_proj"]))
