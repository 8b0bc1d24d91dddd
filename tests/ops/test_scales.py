"""The scales follow the rank, whatever changed it, and what a user set."""

import copy
import pickle

import pytest
import torch
from growing import growing
from peft import get_peft_model
from peft.helpers import rescale_adapter_scale
from sizes import resize
from torch import nn


def adapted(**options):
    config = growing(**({"r": 4, "lora_alpha": 8, "target_modules": ["0"]} | options))
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    return model, model.base_model.model[0]


FORMS = pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, 8 / 4),
        ({"scaling": "rank"}, 8 / 3),
        ({"use_rslora": True}, 8 / 4**0.5),
        ({"scaling": "rank", "use_rslora": True}, 8 / 3**0.5),
    ],
)


def new_values(layer, rank):
    for parameter, shape in zip(layer.factors("default"), ((rank, 8), (8, rank), (rank, 1)), strict=True):
        parameter.data = torch.ones(shape)


@FORMS
@pytest.mark.parametrize("way", ["grow", "resize", "values"])
def test_the_scale_is_that_of_the_rank(options, wanted, way):
    _, layer = adapted(**options)
    if way == "grow":
        layer.structure.grow(layer, "default", 2, torch.Generator())
    elif way == "resize":
        resize(layer, 3)
    else:
        new_values(layer, 3)
    assert layer.r == {"default": 3}
    assert layer.scaling["default"] == wanted


@FORMS
def test_a_compiled_graph_takes_the_same_scale(options, wanted):
    _, layer = adapted(**options)
    new_values(layer, 3)
    if options.get("scaling") == "rank":
        assert layer.scaling.in_graph("default").tolist() == [wanted]


@FORMS
def test_what_a_user_set_stays_through_a_growth(options, wanted):
    _, layer = adapted(**options)
    layer.scaling["default"] *= 2.0
    layer.structure.grow(layer, "default", 2, torch.Generator())
    assert layer.scaling["default"] == pytest.approx(2.0 * wanted, rel=1e-15)
    layer.unscale_layer()
    assert layer.scaling["default"] == wanted


def test_a_configuration_that_is_changed_afterwards_changes_no_scale():
    model, layer = adapted()
    model.peft_config["default"].r = 16
    layer.lora_alpha["default"] = 100
    assert layer.scaling["default"] == 2.0
    layer.set_scale("default", 1.0)
    assert layer.scaling["default"] == 100 / 16


def test_a_rescaling_of_pefts_comes_to_its_end():
    model, layer = adapted()
    with rescale_adapter_scale(model, multiplier=0.5):
        assert layer.scaling["default"] == 1.0
    assert layer.scaling["default"] == 2.0
    layer.structure.grow(layer, "default", 1, torch.Generator())
    assert layer.scaling == {"default": 2.0}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_a_layer_has_scales_of_its_own(way):
    _, layer = adapted(scaling="rank")
    other = way(layer)
    other.structure.grow(other, "default", 1, torch.Generator())
    other.scaling["default"] *= 3.0
    assert (layer.scaling["default"], other.scaling["default"]) == (8.0, 12.0)


def test_a_rank_cannot_be_assigned():
    _, layer = adapted()
    with pytest.raises(TypeError):
        layer.r["default"] = 3
    with pytest.raises(AttributeError, match="which training and loading change"):
        layer.r = {"default": 3}


def test_a_deleted_adapter_has_no_scale():
    model, layer = adapted()
    model.add_adapter("other", growing(r=4, target_modules=["0"]))
    model.delete_adapter("default")
    assert list(layer.scaling) == list(layer.r) == ["other"]
