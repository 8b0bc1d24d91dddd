"""Tiny mixtures of experts and a dense model, from their configurations, always with the same weights."""

import torch
import transformers

SIZE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
GROUPED = SIZE | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
ROUTED = GROUPED | {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
# By name: the architecture in transformers, and its configuration. Layer 0 is dense where that can be.
MODELS = {
    "DeepseekV3": ("DeepseekV3", ROUTED | DEEPSEEK | LATENT),
    "Glm4Moe": ("Glm4Moe", ROUTED | DEEPSEEK),
    "Qwen3Moe": ("Qwen3Moe", ROUTED | {"num_experts": 4, "mlp_only_layers": [0]}),
    "Qwen2Moe": (
        "Qwen2Moe",
        ROUTED | {"num_experts": 4, "mlp_only_layers": [0], "shared_expert_intermediate_size": 24},
    ),
    "Mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4}),
    "Olmoe": ("Olmoe", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "GptOss": ("GptOss", GROUPED | {"num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
    "Phimoe": ("Phimoe", GROUPED | {"num_local_experts": 4}),
    "GraniteMoe": ("GraniteMoe", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Jamba": (
        "Jamba",
        GROUPED
        | {"num_experts": 4, "attn_layer_period": 1, "attn_layer_offset": 0, "use_mamba_kernels": False},
    ),
    "Llama": ("Llama", GROUPED),
}


def build(name, **settings):
    architecture, arguments = MODELS[name]
    config = getattr(transformers, f"{architecture}Config")(**(arguments | settings))
    state = torch.get_rng_state()
    torch.manual_seed(7)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    torch.set_rng_state(state)
    return model


def logits(model):
    tokens = torch.randint(0, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits
