"""The scheduler's state as one value in a checkpoint: what goes in comes out."""

import io
import math

import pytest
import torch
from increlora_rs.training import checkpoint as saved_state

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (5,), (), (0, 4)], ids=str)
def test_a_tensor_comes_back_bit_for_bit(dtype, shape):
    value = (torch.randn(shape) * 50).to(dtype)
    back = saved_state.unpack(saved_state.pack({"version": 3, "x": [value]}))["x"][0]
    assert (back.dtype, back.shape) == (dtype, shape)
    assert torch.equal(back, value)


def test_a_tensor_that_is_not_contiguous_comes_back():
    value = torch.arange(12.0).reshape(3, 4).T
    assert torch.equal(saved_state.unpack(saved_state.pack({"version": 3, "x": value}))["x"], value)


def test_numbers_come_back_to_the_last_digit():
    numbers = [0.1, 1 / 3, 1e-310, math.inf, -math.inf, 2**70]
    assert saved_state.unpack(saved_state.pack({"version": 3, "x": numbers}))["x"] == numbers


def test_a_number_that_is_none_stays_so():
    assert math.isnan(saved_state.unpack(saved_state.pack({"version": 3, "x": math.nan}))["x"])


def test_a_checkpoint_of_it_is_read_without_code():
    packed = saved_state.pack({"version": 3, "x": torch.ones(2)})
    file = io.BytesIO()
    torch.save({"group": packed}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["group"] == packed


def test_a_state_of_a_later_release_is_refused_with_its_version():
    with pytest.raises(ValueError, match="has version 4, this release reads up to 3"):
        saved_state.unpack(saved_state.pack({"version": 4}))


@pytest.mark.parametrize(
    "value",
    ["", "{", "[1]", "{}", 7, None, '{"version": 3, "x": {"dtype": "float9", "shape": [1], "data": "AAAA"}}'],
)
def test_what_is_no_state_is_refused_with_the_way_out(value):
    with pytest.raises(
        ValueError, match=r"optimizer: the scheduler's state under 'increlora' .* cannot be read"
    ):
        saved_state.unpack(value)
