"""Adapters on quantised linear layers, with the libraries that quantise, on the CPU."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from growing import growing
from increlora_rs import attach
from increlora_rs.layers.found import adapted_layers
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

WIDTH = 64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def _replace(net, make):
    for name in ("first", "second"):
        setattr(net, name, make(getattr(net, name)))
    return net


def bnb_8bit(net):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def make(linear):
        quantised = bnb.nn.Linear8bitLt(
            WIDTH, WIDTH, bias=linear.bias is not None, has_fp16_weights=False, threshold=6.0
        )
        quantised.load_state_dict(linear.state_dict())
        return quantised.to("cpu")

    return _replace(net, make)


def bnb_4bit(net):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def make(linear):
        quantised = bnb.nn.Linear4bit(
            WIDTH, WIDTH, bias=linear.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
        )
        quantised.load_state_dict(linear.state_dict())
        return quantised.to("cpu")

    return _replace(net, make)


def _torchao(net, config, **kwargs):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(
        net, getattr(quantization, config)(**kwargs), lambda module, name: name in ("first", "second")
    )
    return net


def torchao_int8(net):
    return _torchao(net, "Int8WeightOnlyConfig")


def torchao_int4(net):
    return _torchao(net, "IntxWeightOnlyConfig", weight_dtype=torch.int4)


def torchao_float8(net):
    return _torchao(net, "Float8WeightOnlyConfig")


def torchao_int8_dynamic(net):
    return _torchao(net, "Int8DynamicActivationInt8WeightConfig")


def hqq(net):
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)

    def make(linear):
        return quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")

    return _replace(net, make)


TRAINABLE = [bnb_8bit, bnb_4bit, torchao_int8, torchao_int4, torchao_float8, hqq]
FORMATS = {make.__name__: make for make in (*TRAINABLE, torchao_int8_dynamic)}
TRAINABLE = [make.__name__ for make in TRAINABLE]


# Every kind that can be quantised anew: the bits that its weight and activations come to, and how it is made.


def _hqq(linear, compute_dtype=torch.float32, **kwargs):
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    config = quantize.BaseQuantizeConfig(**({"group_size": 64} | kwargs))
    return quantize.HQQLinear(linear, config, compute_dtype=compute_dtype, device="cpu")


def _bnb(linear, kind, **kwargs):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantised = getattr(bnb.nn, kind)(WIDTH, WIDTH, bias=linear.bias is not None, **kwargs)
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


def _bnb_8bit(linear, **kwargs):
    return _bnb(linear, "Linear8bitLt", **kwargs)


def _bnb_4bit(linear, **kwargs):
    return _bnb(linear, "Linear4bit", compute_dtype=torch.float32, **kwargs)


def _ao(linear, name, **kwargs):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = getattr(quantization, name)(**kwargs)
    quantization.quantize_(linear, config)
    linear.config = config
    return linear


REQUANTISED = {
    "hqq_8": (8, _hqq, {"nbits": 8}),
    "hqq_4": (4, _hqq, {"nbits": 4, "axis": 1}),
    "hqq_4_axis_0": (4, _hqq, {"nbits": 4, "axis": 0}),
    "hqq_4_as_float": (4, _hqq, {"nbits": 4, "axis": 1, "view_as_float": True}),
    "hqq_8_whole_rows": (8, _hqq, {"nbits": 8, "group_size": None}),
    "hqq_8_bfloat16": (7, _hqq, {"nbits": 8, "compute_dtype": torch.bfloat16}),
    "bnb_8": (7, _bnb_8bit, {"has_fp16_weights": False, "threshold": 6.0}),
    "bnb_8_kept_whole": (7, _bnb_8bit, {"has_fp16_weights": True}),
    "bnb_nf4": (4, _bnb_4bit, {"quant_type": "nf4"}),
    "bnb_nf4_single": (4, _bnb_4bit, {"quant_type": "nf4", "compress_statistics": False}),
    "bnb_nf4_bfloat16": (4, _bnb_4bit, {"quant_type": "nf4", "quant_storage": torch.bfloat16}),
    "bnb_fp4": (3, _bnb_4bit, {"quant_type": "fp4"}),
    "torchao_int8": (8, _ao, {"name": "Int8WeightOnlyConfig"}),
    "torchao_int4": (4, _ao, {"name": "IntxWeightOnlyConfig", "weight_dtype": torch.int4}),
    "torchao_float8": (5, _ao, {"name": "Float8WeightOnlyConfig"}),
    "torchao_int8_dynamic": (7, _ao, {"name": "Int8DynamicActivationInt8WeightConfig"}),
}


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def bias(request):
    return request.param


@pytest.fixture(params=REQUANTISED)
def requantised(request, bias):
    """(model of one adapted layer, its base layer, x, the bits of its kind)."""
    bits, make, kwargs = REQUANTISED[request.param]
    torch.manual_seed(7)
    linear = nn.Linear(WIDTH, WIDTH, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(2.0)
        if bias:
            linear.bias.fill_(3.0)
    net = nn.Sequential(make(linear.requires_grad_(False), **kwargs))
    config = getattr(net[0], "config", None)
    if config is not None:
        # As a model that transformers quantised says it.
        said = SimpleNamespace(get_apply_tensor_subclass=lambda: config)
        net.hf_quantizer = SimpleNamespace(quantization_config=said)
    model = get_peft_model(net, growing(r=4, lora_alpha=4, target_modules=["0"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.5)
    dtype = kwargs.get("compute_dtype", torch.float32)
    return model, model.base_model.model[0].get_base_layer(), torch.randn(16, WIDTH, dtype=dtype), bits


def _near(y, wanted, model, x, bits):
    """Is the difference what rounding to so many bits makes of the update?"""
    with model.disable_adapter():
        update = wanted - model(x)
    return (y - wanted).norm() < 8 * 2.0**-bits * update.norm()


def _held(module):
    """What a module has beside its weight, to compare: all that can be compared."""
    plain = (bool, int, float, str, tuple, torch.dtype, torch.device, type(None))
    attributes = {name: value for name, value in vars(module).items() if isinstance(value, plain)}
    weight = getattr(module, "weight", None)
    settings = ("quant_type", "blocksize", "compress_statistics", "quant_storage", "bnb_quantized")
    attributes |= {f"weight.{name}": getattr(weight, name, None) for name in settings}
    attributes["quant_config"] = copy.deepcopy(getattr(module, "quant_config", None))
    attributes["weight"] = type(weight), getattr(weight, "requires_grad", None)
    attributes["order"] = [(name, type(p), p.device, p.dtype) for name, p in module.named_parameters()]
    return attributes


@pytest.mark.filterwarnings("ignore:.*quantised anew")
def test_a_merged_layer_gives_the_adapters_output_to_the_rounding(requantised):
    model, _, x, bits = requantised
    with torch.no_grad():
        wanted = model(x)
        twin = copy.deepcopy(model)
        model.merge_adapter(safe_merge=True)
        assert _near(model(x), wanted, twin, x, bits)


@pytest.mark.filterwarnings("ignore:.*quantised anew")
def test_an_unmerged_layer_is_the_one_before_however_often(requantised):
    model, _, x, _ = requantised
    with torch.no_grad():
        wanted = model(x)
        model.merge_adapter()
        merged = model(x)
        for _ in range(2):
            model.unmerge_adapter()
            torch.testing.assert_close(model(x), wanted)
            model.merge_adapter()
            torch.testing.assert_close(model(x), merged)


@pytest.mark.filterwarnings("ignore:.*quantised anew")
def test_merging_and_unmerging_leave_all_but_the_weight(requantised):
    model, layer, x, _ = requantised
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer.note = "mine"
    with torch.no_grad():
        # bitsandbytes learns some of its settings at the first call.
        model(x)
        before, bias = _held(layer), layer.bias
        for step in (model.merge_adapter, model.unmerge_adapter, model.merge_adapter):
            step()
            calls.clear()
            model(x)
            assert calls == [1]
            assert model.base_model.model[0].get_base_layer() is layer
            assert layer.bias is bias
            assert _held(layer) == before
        assert model.merge_and_unload()[0] is layer


@pytest.mark.filterwarnings("ignore:.*quantised anew")
def test_two_adapters_merge_and_unmerge(requantised):
    model, _, x, bits = requantised
    model.add_adapter("other", growing(r=2, lora_alpha=2, target_modules=["0"]))
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            nn.init.normal_(parameter, 0.0, 0.5)
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        wanted = model(x)
        twin = copy.deepcopy(model)
        model.merge_adapter()
        assert _near(model(x), wanted, twin, x, bits - 1)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.filterwarnings("ignore:.*quantised anew")
def test_a_copy_of_a_merged_layer_unmerges(requantised):
    model, _, x, _ = requantised
    with torch.no_grad():
        wanted = model(x)
        model.merge_adapter()
        merged = model(x)
        twin = copy.deepcopy(model)
        twin.unmerge_adapter()
        torch.testing.assert_close(twin(x), wanted)
        torch.testing.assert_close(model(x), merged)


def test_a_weight_that_another_layer_shares_stays_there():
    torch.manual_seed(7)
    first = _bnb_4bit(nn.Linear(WIDTH, WIDTH), quant_type="nf4")
    second = _bnb_4bit(nn.Linear(WIDTH, WIDTH), quant_type="nf4")
    second.weight = first.weight
    model = get_peft_model(
        nn.Sequential(first, second), growing(r=4, target_modules=["0"], init_lora_weights=False)
    ).eval()
    x = torch.randn(4, WIDTH)
    with torch.no_grad(), pytest.warns(UserWarning, match="quantised anew"):
        wanted = second(x)
        model.merge_adapter()
        torch.testing.assert_close(second(x), wanted)
    assert second.weight.bnb_quantized


def test_a_weight_that_cannot_be_quantised_anew_is_left_and_told():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = quantization.FqnToConfig({"0": quantization.Int8WeightOnlyConfig()})
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    quantization.quantize_(net, config, filter_fn=None)
    said = SimpleNamespace(get_apply_tensor_subclass=lambda: config)
    net.hf_quantizer = SimpleNamespace(quantization_config=said)
    config = growing(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(net, config).eval()
    x = torch.randn(4, WIDTH)
    with torch.no_grad(), pytest.warns(UserWarning, match="quantised anew"):
        wanted = model(x)
        with pytest.raises(ValueError, match=r"torchao cannot quantise the weight anew, .*unquantised"):
            model.merge_adapter()
        torch.testing.assert_close(model(x), wanted)


def base(name):
    torch.manual_seed(7)
    net = Net()
    # Rounding in 4 bits must not hide the update.
    with torch.no_grad():
        for linear in (net.first, net.second):
            linear.weight.mul_(2.0)
    return FORMATS[name](net).eval().requires_grad_(False)


def adapted(name, **kwargs):
    config = growing(
        **({"r": 3, "lora_alpha": 6, "target_modules": ["first", "second"], "growth_end": 0.6} | kwargs)
    )
    net = base(name)
    torch.manual_seed(3)
    return get_peft_model(net, config)


def batch(n=16):
    torch.manual_seed(5)
    x = torch.randn(n, WIDTH)
    return x, torch.sin(3 * x[:, :4])


def fill(model):
    generator = torch.Generator().manual_seed(11)
    for layer in adapted_layers(model, "default").values():
        layer.structure.grow(layer, "default", 2, generator)
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_(0.0, 0.3, generator=generator)


@pytest.mark.parametrize("name", FORMATS)
def test_the_output_is_the_quantised_layers_plus_the_update(name):
    model = adapted(name)
    fill(model)
    x, _ = batch()
    for layer in adapted_layers(model, "default").values():
        update = layer.get_delta_weight("default").detach()
        wanted = layer.get_base_layer()(x) + x @ update.T
        assert (x @ update.T).abs().max() > 0.1
        torch.testing.assert_close(layer(x).detach(), wanted.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_training_grows_to_its_budget_and_leaves_the_weight_alone(name, tmp_path):
    model = adapted(name).train()
    x, target = batch()
    with torch.no_grad():
        before = base(name)(x)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = attach(model, optimizer, total_steps=30)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert scheduler.total_rank == scheduler.budget == 6
    assert min(scheduler.scores.values()) > 0.0
    assert losses[-1] < 0.6 * losses[0]
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(name), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
        with model.disable_adapter():
            torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_reach_the_input_through_the_quantised_layer(name):
    model = adapted(name)
    fill(model)
    layer = next(iter(adapted_layers(model, "default").values()))
    x, _ = batch()
    # An evaluation in between, after which bitsandbytes keeps another layout on some CPUs.
    with torch.no_grad():
        model.eval()(x)
    model.train()
    x.requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    # The weight as the layer applies it.
    weight = layer.get_base_layer()(torch.eye(WIDTH)) - layer.get_base_layer()(torch.zeros(1, WIDTH))
    wanted = 2 * y.detach() @ (weight.detach().T + layer.get_delta_weight("default").detach())
    assert (x.grad - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("name", ["bnb_8bit", "bnb_4bit", "hqq"])
def test_merging_quantises_anew_with_a_warning(name):
    model = adapted(name)
    fill(model)
    x, _ = batch()
    with torch.no_grad():
        plain, wanted = base(name)(x), model.eval()(x)
    with pytest.warns(UserWarning, match="quantised anew"):
        merged = model.merge_and_unload()
    with torch.no_grad():
        error = (merged(x) - wanted).norm() / (wanted - plain).norm()
    assert type(merged.first) is type(base(name).first)
    assert error < (0.1 if name == "bnb_8bit" else 0.3)


def test_training_through_a_layer_that_passes_no_gradient_on_is_refused_by_name():
    model = adapted("torchao_int8_dynamic").train()
    x, _ = batch()
    with pytest.raises(ValueError, match=r"Linear \(Int8Tensor\) passes no gradient on"):
        model(x.requires_grad_())


@pytest.mark.parametrize("name", ["torchao_int8", "torchao_int4", "torchao_int8_dynamic"])
def test_merging_into_a_weight_that_cannot_be_quantised_anew_is_refused_by_name(name):
    model = adapted(name)
    fill(model)
    x, _ = batch()
    before = model.eval()(x).detach()
    with pytest.raises(ValueError, match=r"'default' cannot be merged .* torchao.*unquantised"):
        model.merge_adapter()
    torch.testing.assert_close(model(x).detach(), before)


@pytest.mark.parametrize("name", ["bnb_8bit", "bnb_4bit"])
def test_a_copy_gives_the_same_output(name):
    model = adapted(name)
    fill(model)
    x, _ = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), model(x))


def _transformers_config(name):
    if name.startswith("bnb"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        kwargs = {"load_in_8bit": True} if name == "bnb_8bit" else {"load_in_4bit": True}
        return BitsAndBytesConfig(**kwargs)
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    int8 = quantization.Int8WeightOnlyConfig()
    int4 = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4)
    return TorchAoConfig(int8 if name == "torchao_int8" else int4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bnb_8bit", "bnb_4bit", "torchao_int8", "torchao_int4"])
def test_a_model_that_transformers_quantised_trains_is_saved_and_merges(name, tokens, tmp_path):
    torch.manual_seed(7)
    # bitsandbytes takes blocks of 64 in a row.
    llama = LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "base")

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            quantization_config=_transformers_config(name),
            device_map="cpu",
            dtype=torch.float32,
        )

    config = growing(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(prepare_model_for_kbit_training(load()), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = attach(model, optimizer, total_steps=30)
    losses = []
    for _ in range(30):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert scheduler.total_rank == scheduler.budget == 12
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = model(tokens).logits
        loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
        torch.testing.assert_close(loaded(tokens).logits, wanted, rtol=1e-3, atol=1e-3)
        with model.disable_adapter():
            change = (model(tokens).logits - wanted).norm()
        with pytest.warns(UserWarning, match="quantised anew"):
            merged = model.merge_and_unload()
        assert (merged(tokens).logits - wanted).norm() < 0.4 * change


# DoRA.


@pytest.mark.parametrize("name", FORMATS)
def test_magnitudes_act_on_the_weight_that_the_library_gives(name):
    torch.manual_seed(7)
    net = FORMATS[name](Net().requires_grad_(False))
    config = growing(r=4, init_r=2, lora_alpha=4, target_modules=["first", "second"], use_dora=True)
    model = get_peft_model(net, config).eval()
    for layer in adapted_layers(model, "default").values():
        base, x = layer.get_base_layer(), torch.randn(5, WIDTH)
        bias = torch.zeros(WIDTH) if base.bias is None else base.bias.detach()
        # Two calls of a library's layer need not round alike.
        assert (layer(x) - base(x)).norm() < 0.01 * base(x).norm()
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_(0.0, 0.3)
            layer.magnitude("default").weight.mul_(torch.linspace(0.5, 2.0, WIDTH))
        weight = base(torch.eye(WIDTH)).detach().t() - bias.view(-1, 1)
        update = layer.get_delta_weight("default")
        gain = layer.magnitude("default").weight / (weight + update).norm(dim=1)
        wanted = (base(x) - bias + x @ update.t()) * gain + bias
        # 8 bits of activations, where a library rounds them too, are not those of the unit matrix.
        assert (layer(x) - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("name", TRAINABLE)
def test_magnitudes_on_a_quantised_base_learn(name):
    torch.manual_seed(7)
    net = FORMATS[name](Net().requires_grad_(False))
    config = growing(r=4, init_r=2, lora_alpha=4, target_modules=["first", "second"], use_dora=True)
    model = get_peft_model(net, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(16, WIDTH)
    losses = []
    for _ in range(20):
        loss = (model(x) - x[:, :4].sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    first = [layer.magnitude("default").weight for layer in adapted_layers(model, "default").values()]
    assert all(torch.isfinite(m).all() for m in first)
