"""The extension in a process of its own, without the package, which takes seconds to import."""

import os
import subprocess
import sys

from increlora_rs import _core

_LOAD = """
import sys, torch
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("_core", sys.argv[1])
_core = module_from_spec(spec)
spec.loader.exec_module(_core)
"""


def run(program, **environment):
    """The process that ended: ``program`` finds ``torch`` and ``_core``."""
    return subprocess.run(
        [sys.executable, "-c", _LOAD + program, _core.__file__],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
