"""vLLM itself, by the Python of another environment, which INCRELORA_VLLM_PYTHON names: vLLM asks for another
Transformers than these tests, and its package for GPUs for another torch."""

import json
import os
import subprocess
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "workers" / "vllm_engine.py"
PYTHON = os.environ.get("INCRELORA_VLLM_PYTHON")
needed = pytest.mark.skipif(
    PYTHON is None,
    reason="vLLM needs an environment of its own; INCRELORA_VLLM_PYTHON may name the Python of one",
)


def ask(**request):
    """What the worker answers."""
    # It must not find this environment's packages.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, str(WORKER)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=1800,
        env=environment,
    )
    for line in done.stdout.splitlines():
        if line.startswith("ANSWER"):
            return json.loads(line.removeprefix("ANSWER"))
    raise AssertionError(f"vLLM ended with {done.returncode}: {done.stderr[-3000:]}")
