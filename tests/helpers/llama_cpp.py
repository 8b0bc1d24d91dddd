"""llama.cpp itself, by the package xllamacpp, in a process of its own."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "workers" / "llama_server.py"
needed = pytest.mark.skipif(
    find_spec("xllamacpp") is None,
    reason="llama.cpp runs by the package xllamacpp, which is not installed; the extra 'test' has it, on "
    "Linux and x86-64",
)


def next_tokens(base, adapters, prompts, vocabulary):
    """Log-probabilities, float64 (prompts, vocabulary), of the token after each prompt.

    Args:
        base: The model's GGUF file.
        adapters: GGUF files.
        prompts: Pairs of a list of tokens and the scale of each adapter.
        vocabulary: Number of tokens.
    """
    request = {"base": str(base), "adapters": [str(path) for path in adapters], "prompts": prompts}
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        input=json.dumps(request | {"vocabulary": vocabulary}),
        capture_output=True,
        text=True,
        timeout=120,
        # A failed assertion would call gdb, which waits.
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )
    for line in done.stdout.splitlines():
        if line.startswith("ANSWER"):
            return torch.tensor(json.loads(line.removeprefix("ANSWER")), dtype=torch.float64)
    raise AssertionError(f"llama.cpp ended with {done.returncode}: {done.stderr[-3000:]}")
