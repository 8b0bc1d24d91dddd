"""Every method on a quantised linear layer: what it adds there, what it learns, and merging."""

import pytest
import torch
from method_cases import EVERY, adapted, adapted_modules, dense, optimizer_of
from torch import nn

WIDTH = 64


def bnb_4bit(linear):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantised = bnb.nn.Linear4bit(WIDTH, WIDTH, compute_dtype=torch.float32, quant_type="nf4")
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


def torchao_int8(linear):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear


def hqq(linear):
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    return quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


QUANTISED = pytest.mark.parametrize("quantise", [bnb_4bit, torchao_int8, hqq], ids=lambda way: way.__name__)


def base_of(quantise):
    torch.manual_seed(5)
    return nn.ModuleDict({"body": quantise(nn.Linear(WIDTH, WIDTH)), "tail": nn.Linear(4, 4)})


def x_of(rows=6):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))


def layer_on(method, quantise, **settings):
    """The adapted layer, in its model."""
    model = adapted(method, base_of(quantise), target_modules=["body"], rank_pattern={}, **settings)
    (layer,) = adapted_modules(model).values()
    return layer, model


@EVERY
@QUANTISED
def test_the_dense_update_is_added_to_what_the_quantised_layer_gives(method, quantise):
    layer, _ = layer_on(method, quantise, init_lora_weights=False)
    x = x_of().requires_grad_()
    wanted = base_of(quantise)["body"](x) + (x.double() @ dense(method, layer, "body").t()).float()
    found = layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(result.square().sum(), x)[0] for result in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@EVERY
@QUANTISED
def test_it_learns_on_a_quantised_layer(method, quantise):
    layer, _ = layer_on(method, quantise)
    layer.train()
    optimizer, target, losses = optimizer_of(layer), x_of(7)[1:], []
    for _ in range(15):
        loss = (layer(x_of()) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0]


@EVERY
@torch.no_grad()
def test_it_merges_into_a_quantised_layer_and_the_weight_comes_back(method):
    layer, model = layer_on(method, hqq, init_lora_weights=False)
    x = x_of()
    wanted = layer(x)
    added = wanted - base_of(hqq)["body"](x)
    with pytest.warns(UserWarning, match="quantise"):
        model.merge_adapter()
    # As near as four bits are.
    assert float((layer(x) - wanted).norm()) < 0.5 * float(added.norm())
    model.unmerge_adapter()
    assert torch.equal(layer(x), wanted)
