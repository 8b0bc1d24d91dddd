"""Random numbers that every process, and a resumed training, draws alike."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A generator of the CPU, new for every purpose; it depends on nothing else."""
    text = "/".join(map(str, (seed, *purpose))).encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
    return torch.Generator().manual_seed(number)
