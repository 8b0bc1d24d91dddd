"""The scales as numbers and as tensors."""

import copy
import pickle

import pytest
from increlora_rs.scales import Scales


def test_a_tensor_follows_its_number_and_keeps_its_identity():
    scales = Scales({"default": 2.0})
    tensor = scales.tensors["default"]
    scales["default"] *= 3
    assert scales == {"default": 6.0}
    assert scales.tensors["default"] is tensor
    assert tensor.tolist() == [6.0]


def test_a_deleted_scale_takes_its_tensor_along():
    scales = Scales({"default": 2.0, "other": 1.0})
    del scales["other"]
    assert list(scales.tensors) == ["default"]


@pytest.mark.parametrize(
    "way", [Scales.copy, copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_copies_have_tensors_of_their_own(way):
    scales = Scales({"default": 2.0})
    other = way(scales)
    other["default"] = 5.0
    assert isinstance(other, Scales)
    assert scales.tensors["default"].tolist() == [2.0]
    assert other.tensors["default"].tolist() == [5.0]
