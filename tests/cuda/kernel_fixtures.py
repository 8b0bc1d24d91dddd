"""Where the kernels' tests run: on an emulator of CUDA, its threads from first to last and from last to
first, and on a device where there is one. The Rust code that launches the kernels is the same."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from increlora_rs import _core

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "src" / "kernels" / "cuda"

no_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The kernels' own sources compiled for the CPU."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    assert compiler, "the tests need a C++ compiler (c++, or what CXX names)"
    library = tmp_path_factory.mktemp("emulator") / "emulator.so"
    source = HERE / "emulator" / "emulator.cpp"
    flags = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Werror=uninitialized",
        "-Wno-unknown-pragmas",
    ]
    command = [compiler, *flags, "-I", str(KERNELS), "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the emulator does not compile:\n{done.stderr}"
    loaded = ctypes.CDLL(str(library))
    loaded.emulator_launched.restype = ctypes.c_char_p
    loaded.emulator_philox.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p]
    loaded.emulator_round.argtypes = [ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p]
    return loaded


@pytest.fixture
def emulated(emulator):
    """Launches for CPU tensors go to the emulator during this test."""
    address = ctypes.cast(emulator.emulator_launch, ctypes.c_void_p).value
    emulator.emulator_launched()
    _core.cuda_emulate(address)
    yield emulator
    _core.cuda_emulate(0)
    emulator.emulator_reverse(0)


@pytest.fixture(
    params=[
        "emulated",
        "emulated, last thread first",
        pytest.param("cuda", marks=[pytest.mark.gpu, no_device]),
    ]
)
def device(request):
    """The device of the tensors that the kernels are given."""
    if request.param == "cuda":
        assert _core.cuda_prepare(torch.cuda.current_device()) is None
        return "cuda"
    emulated = request.getfixturevalue("emulated")
    emulated.emulator_reverse(request.param != "emulated")
    return "cpu"


@pytest.fixture
def stream(device):
    """Torch's current stream there."""
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()) if device == "cuda" else 0
