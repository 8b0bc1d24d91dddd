"""How servers read a LoRA directory: their loading rules, each written down as a function from the
directory to the updates that the server would add to the base weights."""

import json
import re

import torch
from safetensors.torch import load_file

# vllm/config/lora.py: MaxLoRARanks.
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Refused(Exception):
    """The server would not load the directory."""


def _read(path):
    config = json.loads((path / "adapter_config.json").read_text())
    return config, {k: t.double() for k, t in load_file(path / "adapter_model.safetensors").items()}


def _pairs(tensors):
    """A and B by module, and whether they are of an embedding."""
    pairs = {}
    for a_key in tensors:
        for a_end, b_end in (
            (".lora_A.weight", ".lora_B.weight"),
            (".lora_embedding_A", ".lora_embedding_B"),
        ):
            if a_key.endswith(a_end):
                name = a_key.removesuffix(a_end)
                pairs[name] = tensors[a_key], tensors[name + b_end], "embedding" in a_end
    return pairs


def _update(a, b, embedding):
    return (b @ a).T if embedding else b @ a


def _short(name):
    return name.removeprefix("base_model.model.")


def vllm(path, max_lora_rank):
    """One scale for all modules; tensors are copied into zeroed slots of ``max_lora_rank`` rows."""
    config, tensors = _read(path)
    if max_lora_rank not in MAX_LORA_RANKS:
        raise Refused(f"--max-lora-rank {max_lora_rank} is no choice")
    if config["r"] > max_lora_rank:
        raise Refused(f"LoRA rank {config['r']} is greater than max_lora_rank {max_lora_rank}")
    if config["modules_to_save"] is not None or config["use_dora"] or config["bias"] != "none":
        raise Refused("modules_to_save, DoRA or bias")
    for key in tensors:
        if not re.search(r"\.lora_([AB]\.weight|embedding_[AB])$", key):
            raise Refused(f"{key} is unsupported LoRA weight")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    updates = {}
    for name, (a, b, embedding) in _pairs(tensors).items():
        slot_a, slot_b = a.new_zeros(max_lora_rank, a.shape[1]), b.new_zeros(b.shape[0], max_lora_rank)
        slot_a[: a.shape[0]], slot_b[:, : b.shape[1]] = a, b * scale
        updates[_short(name)] = _update(slot_a, slot_b, embedding)
    return updates


def tgi(path):
    """One scale for all modules; the layers of a module type are stacked, so their ranks must agree."""
    config, tensors = _read(path)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    types = {}
    for name, (a, b, embedding) in _pairs(tensors).items():
        if embedding:
            raise Refused(f"{name}: embeddings are not served")
        types.setdefault(re.sub(r"\.\d+\.", ".N.", name), {})[_short(name)] = a, b
    updates = {}
    for members in types.values():
        try:
            a, b = (torch.stack([pair[k] for pair in members.values()]) for k in (0, 1))
        except RuntimeError as error:
            raise Refused(str(error)) from error
        updates |= zip(members, scale * b @ a, strict=True)
    return updates


def llama_cpp(path):
    """The scale is the global alpha over the rank of the tensor at hand; patterns are not read."""
    config, tensors = _read(path)
    for key in tensors:
        if not re.search(r"\.lora_([AB]\.weight|embedding_[AB])$", key):
            raise Refused(f"{key}: not a lora_A or lora_B tensor")
    pairs, alpha = _pairs(tensors).items(), config["lora_alpha"]
    return {_short(n): alpha / b.shape[1] * _update(a, b, embedding) for n, (a, b, embedding) in pairs}
