"""Every kernel compiles, without a GPU, for the architectures that matter."""

import hashlib
import re

import extension
import pytest
import torch
from increlora_rs import _core

ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


def kernels_of(log):
    """{kernel: (stack, spill stores, spill loads, registers)}"""
    assert log.count("Compiling entry function") == len(ENTRY.findall(log)), log
    return {name: tuple(map(int, numbers)) for name, *numbers in ENTRY.findall(log)}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_every_kernel_compiles_without_spills(architecture):
    found = kernels_of(_core.cuda_compile(architecture))
    assert sorted(found) == sorted(_core.cuda_kernels())
    wasteful = {name: numbers for name, numbers in found.items() if any(numbers[:3])}
    assert not wasteful, "kernels with a stack or spills (stack, stores, loads, registers)"


def test_a_kernel_that_spills_is_seen():
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90'\n"
        "ptxas info    : Function properties for k\n"
        "    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers\n"
    )
    assert kernels_of(log) == {"k": (8, 4, 8, 40)}


@pytest.mark.parametrize(
    ("architecture", "error"), [("sm_999", RuntimeError), ("sm_90 --x", ValueError), ("sm_90\0", ValueError)]
)
def test_an_unknown_architecture_is_named(architecture, error):
    with pytest.raises(error, match=architecture.split("\0")[0].split()[0]):
        _core.cuda_compile(architecture)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_missing_device_has_a_reason_and_no_exception():
    reason = _core.cuda_prepare(0)
    assert reason is not None
    assert reason == _core.cuda_unavailable()
    x = torch.ones(4, 8)
    assert _core.cuda_draw_mask(x, 0.5, 1) is None


def device_code(cache):
    """The hash of the device code that a new process gets, its cache folder being ``cache``."""
    program = "import hashlib; print(hashlib.sha256(_core.cuda_cubin('sm_90')).hexdigest())"
    done = extension.run(program, XDG_CACHE_HOME=str(cache))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_device_code_is_kept_for_the_next_process(tmp_path):
    first = device_code(tmp_path)
    (file,) = (tmp_path / "increlora_rs").iterdir()
    assert re.fullmatch(r"sm_90-[0-9a-f]{16}\.cubin", file.name)
    whole, written = file.read_bytes(), file.stat().st_mtime_ns
    assert hashlib.sha256(whole[32:]).hexdigest() == first
    assert device_code(tmp_path) == first
    assert file.stat().st_mtime_ns == written, "the second process compiled again"
    file.write_bytes(whole[:-100])
    assert device_code(tmp_path) == first
    assert file.read_bytes() == whole, "a damaged file is made anew"


@pytest.mark.slow
def test_a_cache_folder_that_cannot_be_made_costs_nothing_but_time(tmp_path):
    no_folder = tmp_path / "file"
    no_folder.touch()
    assert device_code(no_folder)
