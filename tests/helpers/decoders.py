"""Tiny decoders of the classes that llama.cpp was run with, and adapters on them."""

import torch
import transformers
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short

LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED_LAYER = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
OUTSIDE = ["embed_tokens", "lm_head"]
VOCABULARY = 99
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
_GRANITE = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
    "logits_scaling": 1.5,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# What each class's configuration has beside the sizes.
SETTINGS = {
    "Llama": {},
    "Mistral": {"head_dim": 8, "sliding_window": None},
    "Granite": _GRANITE,
    "SmolLM3": {"no_rope_layers": [1, 1], "tie_word_embeddings": False},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Olmo2": {},
    "Gemma2": _GEMMA,
    "Gemma3": _GEMMA,
    "Phi3": {"original_max_position_embeddings": 64},
    "Mixtral": _EXPERTS | {"head_dim": 8},
    "Qwen2Moe": _EXPERTS | {"shared_expert_intermediate_size": 40, "norm_topk_prob": False},
    "Qwen3Moe": _EXPERTS | {"head_dim": 8, "norm_topk_prob": True},
}


def decoder(kind="Llama", **settings):
    """A model of ``kind``, of :data:`SETTINGS`; its numbers, those of norms too, are always the same."""
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    state = torch.get_rng_state()
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**(_SIZES | SETTINGS[kind] | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    torch.set_rng_state(state)
    return model.eval()


def targets(model):
    """Every kind of module that an adapter for llama.cpp may be on."""
    layer = FUSED_LAYER if model.config.model_type == "phi3" else LAYER
    if parameters(model):
        shared = ["gate_proj", "up_proj", "down_proj", "shared_expert_gate"]
        layer = LAYER[:4] + (shared if model.config.model_type == "qwen2_moe" else [])
    return layer if model.config.tie_word_embeddings else layer + OUTSIDE


def parameters(model):
    """Every parameter of experts and routers that one may be on; None: the model has none."""
    return EXPERTS if "moe" in model.config.model_type or model.config.model_type == "mixtral" else None


def updates(model):
    """The update (out, in), or (vocabulary, size) of an embedding, in float64, of each adapted module."""
    layers = {short(name): layer for name, layer in adapted_layers(model, "default").items()}
    return {name: layer.get_delta_weight("default").detach().double() for name, layer in layers.items()}


def next_token_of(model, prompts):
    """Log-probabilities, float64 (prompts, vocabulary), of the token after each prompt."""
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0, -1].double() for prompt in prompts]
    return torch.stack(logits).log_softmax(-1)
