"""Tiny models as the GGUF files that llama.cpp's converter would make of them, written from its rules."""

import gguf
import numpy as np

ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
# The converter's classes: the architecture, whether it interleaves rows of q and k, what it adds to norms.
CONVERTERS = {
    "LlamaForCausalLM": ("llama", True, 0.0),
    "MistralForCausalLM": ("llama", True, 0.0),
    "GraniteForCausalLM": ("granite", True, 0.0),
    "SmolLM3ForCausalLM": ("smollm3", True, 0.0),
    "Qwen2ForCausalLM": ("qwen2", False, 0.0),
    "Qwen3ForCausalLM": ("qwen3", False, 0.0),
    "Olmo2ForCausalLM": ("olmo2", False, 0.0),
    "Gemma2ForCausalLM": ("gemma2", False, 1.0),
    "Gemma3ForCausalLM": ("gemma3", False, 1.0),
    "Phi3ForCausalLM": ("phi3", False, 0.0),
    "MixtralForCausalLM": ("llama", True, 0.0),
    "Qwen2MoeForCausalLM": ("qwen2moe", False, 0.0),
    "Qwen3MoeForCausalLM": ("qwen3moe", False, 0.0),
}


def interleaved(matrix, heads):
    """Within each head: first row of the first half, first of the second, second of the first, and so on."""
    per_head = matrix.reshape(heads, -1, matrix.shape[-1])
    first, second = np.split(per_head, 2, axis=1)
    return np.stack([first, second], axis=2).reshape(matrix.shape)


def write_gguf(model, path):
    """Writes ``model``, of a class of :data:`CONVERTERS` and without the adapters on it, in float32, with a
    vocabulary of words "t3", "t4", ..."""
    name, interleaves, shift = CONVERTERS[type(model).__name__]
    config = model.config
    writer = gguf.GGUFWriter(path, name)
    _settings(writer, config)
    _vocabulary(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(ARCHITECTURES[name], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        if ".lora_" in key or (key.startswith("lm_head.") and config.tie_word_embeddings):
            continue
        key = key.replace(".base_layer.", ".")
        numbers = tensor.float().numpy()
        module = key.split(".")[-2]
        if interleaves and module in heads:
            numbers = interleaved(numbers.reshape(len(numbers), -1), heads[module]).reshape(numbers.shape)
        if key.endswith("norm.weight"):
            numbers = numbers + np.float32(shift)
        for part_key, part in separated(key, numbers).items():
            writer.add_tensor(names.get_name(part_key, (".weight", ".bias")), np.ascontiguousarray(part))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def separated(key, numbers):
    """Of experts in one parameter, (E, out, in), each projection, as the converter stacks it; anything else
    as it is."""
    holder, experts, projection = key.rpartition(".mlp.experts.")
    if not experts:
        # One row is a vector there.
        return {key: numbers[0] if key.endswith("shared_expert_gate.weight") else numbers}
    names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
    parts = np.split(numbers, len(names), axis=1)
    return {f"{holder}{experts}{name}.weight": part for name, part in zip(names, parts, strict=True)}


def _settings(writer, config):
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    optional = {
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "sliding_window": writer.add_sliding_window,
        "num_local_experts": writer.add_expert_count,
        "num_experts_per_tok": writer.add_expert_used_count,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
        "shared_expert_intermediate_size": writer.add_expert_shared_feed_forward_length,
    }
    for name, add in optional.items():
        if getattr(config, name, None):
            add(getattr(config, name))
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)


def _vocabulary(writer, size):
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, size))])
    writer.add_token_scores([0.0] * size)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.NORMAL] * (size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
