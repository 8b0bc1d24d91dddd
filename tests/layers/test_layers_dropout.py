"""A dropout that somebody hooked, or put in the place of the configuration's, is called as LoRA calls it."""

import pytest
import torch
from growing import growing
from increlora_rs.training.modules import adapted_modules
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

KINDS = {
    "Linear": (lambda: nn.Linear(4, 6), (3, 4)),
    "Conv1D": (lambda: Conv1D(6, 4), (3, 4)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 2, 5, 5)),
}


class Halved(nn.Module):
    """Stands for any module that changes what the update is computed from."""

    def forward(self, x):
        return x / 2


@pytest.fixture(params=KINDS)
def layer_and_input(request):
    build, shape = KINDS[request.param]
    config = growing(r=2, target_modules=["0"], init_lora_weights=False, lora_dropout=0.5)
    model = get_peft_model(nn.Sequential(build()), config)
    return adapted_modules(model, "default")[0].layer, torch.randn(shape)


@pytest.mark.parametrize("training", [True, False])
def test_a_module_in_the_dropouts_place_is_called(layer_and_input, training):
    layer, x = layer_and_input
    base = layer.get_base_layer()
    update = layer.eval()(x) - base(x)
    layer.lora_dropout["default"] = Halved()
    layer.train(training)
    torch.testing.assert_close(layer(x), base(x) + update / 2)


def test_a_hook_of_the_dropout_changes_what_is_dropped(layer_and_input):
    layer, x = layer_and_input
    layer.eval()
    base = layer.get_base_layer()
    update = layer(x) - base(x)
    handle = layer.lora_dropout["default"].register_forward_hook(lambda module, args, output: output * 3)
    torch.testing.assert_close(layer(x), base(x) + 3 * update)
    handle.remove()
    torch.testing.assert_close(layer(x), base(x) + update)


def test_gradients_go_through_such_a_module(layer_and_input):
    layer, x = layer_and_input
    layer.train()
    layer.lora_dropout["default"] = Halved()
    x.requires_grad_()
    layer(x).sum().backward()
    weight = layer.get_base_layer().weight
    merged = x.detach().clone().requires_grad_()
    with torch.no_grad():
        weight += layer.get_delta_weight("default") / 2
    layer.get_base_layer()(merged).sum().backward()
    torch.testing.assert_close(x.grad, merged.grad)


def test_a_changed_probability_is_the_one_that_drops(layer_and_input):
    layer, x = layer_and_input
    layer.train()
    layer.lora_dropout["default"].p = 0.0
    torch.testing.assert_close(layer(x), layer.eval()(x))
