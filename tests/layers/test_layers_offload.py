"""Adapters on models that accelerate offloads: they compute, train, merge and save as on a whole model."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from growing import growing
from increlora_rs import attach
from increlora_rs.layers import AdaptedLayer
from increlora_rs.training.modules import adapted_modules
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

_IDS = torch.tensor([[1, 2, 3], [4, 0, 1]])
_TARGETS = ["table", "first", "second"]


class Net(nn.Module):
    _no_split_modules = ()

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 8)
        self.first = nn.Linear(8, 8)
        self.second = Conv1D(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids):
        return self.head(torch.relu(self.second(torch.relu(self.first(self.table(ids))))))


def _on_cpu(net, folder):
    return cpu_offload(net, execution_device=torch.device("cpu"))


def _on_disk(net, folder):
    return disk_offload(net, str(folder), execution_device=torch.device("cpu"))


def _dispatched(net, folder):
    device_map = {"table": "cpu", "first": "disk", "second": "disk", "head": "cpu"}
    if isinstance(net, PeftModel):
        device_map = {f"base_model.model.{name}": device for name, device in device_map.items()}
    return dispatch_model(net, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


PLACES = {"cpu": _on_cpu, "disk": _on_disk, "dispatched": _dispatched}


def _adapted(net, **config):
    config = {"r": 2, "lora_alpha": 2, "target_modules": _TARGETS} | config
    model = get_peft_model(net, growing(**config))
    torch.manual_seed(3)
    with torch.no_grad():
        for module in adapted_modules(model, "default"):
            for factor, _, _ in module.parameters:
                factor.normal_()
    return model


@pytest.fixture(params=PLACES)
def offload(request, tmp_path):
    return lambda net: PLACES[request.param](net, tmp_path / "offloaded")


@pytest.fixture
def whole():
    return _adapted(Net())


@torch.no_grad()
def _outputs(model):
    return model(_IDS)


def test_an_adapter_on_an_offloaded_base_gives_the_whole_models_output(offload, whole):
    torch.testing.assert_close(_outputs(_adapted(offload(Net()))), _outputs(whole))


def test_autocast_gives_the_whole_models_output(offload, whole):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(_outputs(_adapted(offload(Net()))), _outputs(whole), atol=0.1, rtol=0.05)


def test_a_frozen_offloaded_base_gives_the_whole_models_gradients(offload, whole):
    model = _adapted(offload(Net()))
    for each in (model, whole):
        each(_IDS).square().sum().backward()
    for mine, wanted in zip(
        adapted_modules(model, "default"), adapted_modules(whole, "default"), strict=True
    ):
        torch.testing.assert_close(mine.factors[0].grad, wanted.factors[0].grad)


def test_ranks_grow_to_the_budget_on_an_offloaded_base(offload):
    model = _adapted(offload(Net()), tinit=1, deltaT=1, top_h=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scheduler = attach(model, optimizer, total_steps=8)
    for _ in range(8):
        model(_IDS).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scheduler.total_rank == scheduler.budget == 6


def test_a_model_offloaded_with_its_adapter_gives_the_same_output(offload, whole):
    expected = _outputs(whole)
    torch.testing.assert_close(_outputs(offload(copy.deepcopy(whole))), expected)


def test_the_update_of_an_offloaded_adapter_is_the_whole_models(offload, whole):
    model = offload(copy.deepcopy(whole))
    for mine, wanted in zip(
        adapted_modules(model, "default"), adapted_modules(whole, "default"), strict=True
    ):
        torch.testing.assert_close(
            mine.layer.get_delta_weight("default"), wanted.layer.get_delta_weight("default")
        )


@pytest.mark.parametrize("by", ["model", "layer"])
@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "base_and_adapter"])
def test_merging_and_unmerging_reach_the_offloaded_weight(offload, whole, by, with_adapter):
    expected = _outputs(whole)
    model = offload(copy.deepcopy(whole)) if with_adapter else _adapted(offload(Net()))
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    model.merge_adapter() if by == "model" else [layer.merge() for layer in layers]
    torch.testing.assert_close(_outputs(model), expected)
    with model.disable_adapter():
        torch.testing.assert_close(_outputs(model), _outputs(Net()), atol=1e-5, rtol=1e-5)


def test_an_unloaded_model_holds_the_update(offload, whole):
    torch.testing.assert_close(_outputs(_adapted(offload(Net())).merge_and_unload()), _outputs(whole))


def test_a_save_of_an_offloaded_adapter_loads_into_a_whole_model(offload, whole, tmp_path):
    offload(copy.deepcopy(whole)).save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "saved")
    torch.testing.assert_close(_outputs(loaded), _outputs(whole))


def test_an_adapter_is_loaded_into_an_offloaded_model(whole, tmp_path):
    whole.save_pretrained(tmp_path / "saved")
    net = _dispatched(Net(), tmp_path / "offloaded")
    model = PeftModel.from_pretrained(net, tmp_path / "saved", offload_folder=str(tmp_path / "more"))
    torch.testing.assert_close(_outputs(model), _outputs(whole))


def test_numbers_that_are_not_there_are_refused_by_name(whole):
    for layer in whole.modules():
        if isinstance(layer, AdaptedLayer):
            layer.lora_A.to("meta")
    with pytest.raises(ValueError, match="adapter 'default' has parameters on the device 'meta'"):
        _outputs(whole)


def test_merging_into_a_weight_without_numbers_is_refused_by_name(whole):
    whole.base_model.model.first.base_layer.to("meta")
    with pytest.raises(ValueError, match="base weight on the device 'meta'"):
        whole.base_model.model.first.merge()


@pytest.mark.parametrize("computed", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_merging_into_a_weight_that_is_computed_is_refused_by_name(whole, computed):
    computed(whole.base_model.model.first.base_layer)
    with pytest.raises(ValueError, match="computed from other parameters"):
        whole.base_model.model.first.merge()
