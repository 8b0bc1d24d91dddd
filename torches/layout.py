"""Where everything lies in memory that code of torch's headers touches in the extension."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from .dwarf import Types
from .place import Place

_SOURCE = Path(__file__).with_name("layout.cpp")
# As build.rs and .cargo/config.toml have them; every class in full, whoever else has it, private members too.
_FLAGS: tuple[str, ...] = ("-std=c++20", "-D_GLIBCXX_USE_CXX11_ABI=1", "-w", "-c", "-g", "-O0")
_FLAGS += ("-femit-class-debug-always", "-fno-access-control")
# Numbers that no tensor which reaches the extension has, and that move with each dtype that torch gets.
_UNUSED = {("c10::ScalarType", "Undefined"), ("c10::ScalarType", "NumOptions")}
#: By type: its size, members, virtual functions, and the numbers behind enumerators.
Layout = dict[str, list[str]]


def layout(torch: Place) -> Layout:
    """The layout by the headers of ``torch``, whose libraries are not loaded.

    Raises:
        RuntimeError: layout.cpp does not compile against them.
    """
    include = torch.home / "include"
    paths = (include, include / "torch" / "csrc" / "api" / "include", Path(sysconfig.get_path("include")))
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "layout.o"
        command = [*shlex.split(os.environ.get("CXX", "c++")), *_FLAGS, *(f"-I{path}" for path in paths)]
        command += [str(_SOURCE), "-o", str(compiled)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"layout.cpp and torch {torch.version}:\n{done.stderr.strip()}")
        return Types(compiled).pointed_at_by("Touched")


def digest(of: Layout) -> str:
    """A short name of a layout: that of another is another."""
    text = "\n".join(f"{name}\n" + "\n".join(of[name]) for name in sorted(of))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(was: Layout, is_now: Layout) -> list[str]:
    """What code compiled for ``was`` gets wrong where ``is_now`` holds, a line a type.

    An enumeration may have enumerators more.
    """
    found = []
    for name in sorted(was.keys() | is_now.keys()):
        a, b = was.get(name, ["(not there)"]), is_now.get(name, ["(not there)"])
        if _is_enumeration(a) and _is_enumeration(b):
            a = [line for line in a if (name, line.partition(" = ")[0]) not in _UNUSED and line not in b]
            b = a and ["(not there)"]
        if a != b:
            first = next(
                (pair for pair in zip(a, b, strict=False) if pair[0] != pair[1]), (str(len(a)), str(len(b)))
            )
            found.append(f"{name}: {first[0]} | {first[1]}")
    return found


def _is_enumeration(lines: list[str]) -> bool:
    return len(lines) > 1 and all(" = " in line for line in lines[1:])
