"""How servers read an exported adapter: their loading rules, each written down as a function from the
directory or file to the updates that the server would add to the base weights."""

import json
import re

import gguf
import torch
from safetensors.torch import load_file

# vllm/config/lora.py of 0.33.0: MaxLoRARanks.
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


# What vllm/lora/peft_helper.py refuses by these options of PEFT's configuration. Other inits change the base.
_VLLM_REFUSES = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
)
_VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_VLLM_HEADS = ("classifier", "score")


def vllm(path, max_lora_rank, modules=None, vocabulary=None, gated=True, experts=None):
    """vLLM 0.33.0, by its vllm/lora/{peft_helper,lora_model,lora_weights,utils}.py: rank and scale by module,
    by PEFT's patterns; tensors are copied into zeroed slots of ``max_lora_rank`` rows.

    Args:
        path: The adapter's directory.
        max_lora_rank: What it was started with.
        modules: Last parts of the names of the model's linear layers and ``embedding_modules``; None: any.
        vocabulary: The model's; None: any.
        gated: Do the model's experts have a third projection?
        experts: Their number and the names of their projections (``ckpt_names`` of its layer); None: any.
    """
    config, tensors = _read(path)
    _check_for_vllm(config, max_lora_rank)
    heads, updated = set(), {}
    for key, tensor in tensors.items():
        if key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue
        head = re.search(r"(^|\.)(score|classifier)\.(weight|bias)$", key)
        if head and head[2] in (config["modules_to_save"] or ()):
            heads.add(head[2])
        elif re.search(r"\.lora_([AB]\.weight|embedding_[AB])$", key):
            updated[key] = tensor
        else:
            raise Refused(f"{key} is unsupported LoRA weight")
    if len(heads) > 1:
        raise Refused(f"Only one full classification module is supported, received {sorted(heads)}")
    pairs = {_short(name): pair for name, pair in _pairs(updated).items()}
    for name, (a, _, embedding) in pairs.items():
        if modules is not None and name.rpartition(".")[2] not in modules and ".experts" not in name:
            raise Refused(f"expected target modules in {modules} but received {name}")
        if embedding and vocabulary is not None and a.shape[1] != vocabulary:
            raise Refused(f"{name}: the embedding LoRA size must be consistent with the vocabulary size")
    _check_experts(pairs, gated, experts)
    updates = {}
    for name, (a, b, embedding) in pairs.items():
        scale = _scale_in_vllm(config, name)
        slot_a, slot_b = a.new_zeros(max_lora_rank, a.shape[1]), b.new_zeros(b.shape[0], max_lora_rank)
        slot_a[: a.shape[0]], slot_b[:, : b.shape[1]] = a, b * scale
        updates[name] = _update(slot_a, slot_b, embedding)
    return updates


def _check_for_vllm(config, max_lora_rank):
    """PEFTHelper.__post_init__ and validate_legal."""
    if max_lora_rank not in MAX_LORA_RANKS:
        raise Refused(f"--max-lora-rank {max_lora_rank} is no choice")
    ranks = [config["r"], *(config["rank_pattern"] or {}).values()]
    if any(not isinstance(rank, int) or rank <= 0 for rank in ranks):
        raise Refused("LoRA rank must be a positive integer")
    if max(ranks) > max_lora_rank:
        raise Refused(f"LoRA rank {max(ranks)} is greater than max_lora_rank {max_lora_rank}")
    unsupported = set(config["modules_to_save"] or ()) - set(_VLLM_HEADS)
    if unsupported:
        raise Refused(f"modules_to_save {sorted(unsupported)} are unsupported")
    for option in _VLLM_REFUSES:
        if config.get(option):
            raise Refused(f"{option}={config[option]!r} is not supported")
    init = config["init_lora_weights"]
    if isinstance(init, str) and init.lower() not in _VLLM_INITS:
        raise Refused(f"init_lora_weights={init!r} is not supported")
    if config["bias"] != "none":
        raise Refused("Adapter bias is not supported")


def _scale_in_vllm(config, name):
    """PEFTHelper.get_rank_and_scaling."""

    def of(pattern, otherwise):
        matching = (v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name))
        return next(matching, otherwise)

    rank, alpha = of(config["rank_pattern"], config["r"]), of(config["alpha_pattern"], config["lora_alpha"])
    return alpha / (rank**0.5 if config["use_rslora"] else rank)


def _check_experts(pairs, gated, experts):
    """PackedLoRALayerWeights.pack_moe, and what a model with one wrapper an expert says of fused ones."""
    ranks = {}
    count, names = experts or (None, ())
    expected = {f"experts.{number}.{name}" for number in range(count or 0) for name in names}
    for name, (a, _, _) in pairs.items():
        if re.search(r"\.experts(\.base_layer)?$", name):
            raise Refused(f"{name} contains fused 3D MoE weights")
        if experts and ".experts" in name and name[name.index(".experts") + 1 :] not in expected:
            raise Refused(f"expected target modules in {sorted(expected)} but received {name}")
        expert = re.search(r"(.*\.experts)\.(\d+)\.([^.]+)$", name)
        if expert:
            ranks.setdefault(expert[1], {}).setdefault(expert[3], {})[expert[2]] = a.shape[0]
    for layer, projections in ranks.items():
        if len(projections) < (3 if gated else 2) or len({frozenset(e) for e in projections.values()}) > 1:
            raise Refused(f"the experts of {layer} lack a projection")
        if experts and any(len(of_expert) < count for of_expert in projections.values()):
            raise Refused(f"experts of {layer} are missing")
        if any(len(set(of_expert.values())) > 1 for of_expert in projections.values()):
            raise Refused(f"The experts of {layer} have different LoRA ranks for the same projection")


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


def llama_cpp(path, tied=False):
    """``convert_lora_to_gguf.py`` and what loads its file; ``tied``: the base's embedding is its head. The
    scale is the global alpha over the rank of the tensor at hand; patterns are not read, norms dropped."""
    config, tensors = _read(path)
    updated = {}
    for key, tensor in tensors.items():
        if re.search(r"\.lora_([AB]\.weight|embedding_[AB])$", key):
            updated[key] = tensor
        elif not re.search(r"\.base_layer\.weight$|_layernorm|\.norm", key):
            raise Refused(f"{key}: not a lora_A or lora_B tensor")
    pairs, alpha = _pairs(updated).items(), config["lora_alpha"]
    if tied and any(re.search(r"(^|\.)(embed_tokens|lm_head)$", name) for name, _ in pairs):
        raise Refused("an embedding that is the head too")
    return {_short(n): alpha / b.shape[1] * _update(a, b, embedding) for n, (a, b, embedding) in pairs}


def llama_cpp_file(path, base):
    """What llama.cpp's loader (src/llama-adapter.cpp) makes of the adapter ``path`` beside the model
    ``base``, both GGUF files: updates by the name of the base's tensor, its rows in the base's order."""
    file, model = gguf.GGUFReader(path), gguf.GGUFReader(base)
    shapes = {tensor.name: tensor.data.shape for tensor in model.tensors}
    wanted = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": _field(model, "general.architecture"),
    }
    for key, value in wanted.items():
        if _field(file, key) != value:
            raise Refused(f"expect {key} to be {value!r}")
    field = file.get_field("adapter.lora.alpha")
    if field is None or field.types != [gguf.GGUFValueType.FLOAT32]:
        raise Refused("adapter.lora.alpha is no float32")
    factors = {}
    for tensor in file.tensors:
        name, _, factor = tensor.name.rpartition(".")
        if factor not in ("lora_a", "lora_b"):
            raise Refused(f"{tensor.name} has an unexpected suffix")
        factors.setdefault(name, {})[factor] = torch.tensor(tensor.data).double()
    updates = {}
    for name, pair in factors.items():
        if set(pair) != {"lora_a", "lora_b"} or name not in shapes:
            raise Refused(f"{name} is missing one component, or does not exist in the base model")
        if name == "token_embd.weight" and "output.weight" not in shapes:
            raise Refused(f"{name} is the head, too")
        b, embedding = pair["lora_b"], name == "token_embd.weight"
        # Of several experts their number stands before the sizes; a vector is a matrix of one row.
        update = _update(pair["lora_a"].T if embedding else pair["lora_a"], b, embedding)
        if update.shape != ((1, *shapes[name]) if len(shapes[name]) == 1 else shapes[name]):
            raise Refused(f"{name} has an incorrect shape")
        updates[name] = float(field.contents()) / b.shape[-1] * update
    return updates


def _field(file, key):
    field = file.get_field(key)
    return None if field is None else field.contents()
