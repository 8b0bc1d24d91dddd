"""The Python side of the kernels."""

import ctypes
import logging
import subprocess
import sys

import pytest
import torch
from increlora_rs import _core
from increlora_rs.ops import device as cuda


def test_the_compiler_is_found_without_torch_having_loaded_it():
    assert cuda.compilers(), "torch's CUDA packages bring libnvrtc"
    code = (
        f"import ctypes; ctypes.CDLL({str(cuda.compilers()[0])!r}); ctypes.CDLL({cuda.compilers()[0].name!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def unprepared():
    cuda.prepare.cache_clear()
    yield
    cuda.prepare.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_missing_kernels_are_told_once_with_the_reason(unprepared, caplog):
    with caplog.at_level(logging.WARNING, "increlora_rs"):
        assert not cuda.prepare(0)
        assert not cuda.prepare(0)
    (record,) = caplog.records
    assert _core.cuda_unavailable() in record.getMessage()


def test_the_cpu_has_no_stream():
    assert cuda.stream(torch.device("cpu")) == 0


def test_without_an_emulator_the_kernels_take_no_cpu_tensor(emulator):
    ones = torch.ones(2, 8)
    assert _core.cuda_down(ones, ones, 1.0, 0.5, 1) is None
    _core.cuda_emulate(ctypes.cast(emulator.emulator_launch, ctypes.c_void_p).value)
    try:
        assert _core.cuda_down(ones, ones, 1.0, 0.5, 1) is not None
    finally:
        _core.cuda_emulate(0)
