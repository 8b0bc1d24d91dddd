"""Adapters in llama.cpp itself: the next token's probabilities beside those of PEFT's model."""

import llama_cpp
import pytest
import torch
from decoders import LAYER, SETTINGS, VOCABULARY, decoder, next_token_of, parameters, targets
from gguf_models import write_gguf
from growing import growing
from increlora_rs import IncreLoraConfig, MeLoraConfig, MoraConfig, SoraConfig, export_gguf
from peft import get_peft_model

pytestmark = [llama_cpp.needed, pytest.mark.slow]
PROMPTS = [[5, 17, 40, 8, 61], [90, 3, 33, 12, 7, 25, 70, 71, 6, 44, 58, 19]]
# Of the base alone llama.cpp is off by 1e-6 to 4e-6; Gemma's activation is a table in float16 there.
TOLERANCE = 2e-5
OF_GEMMA = 5e-3


@pytest.fixture
def compared(tmp_path):
    """``compared(model, **arguments)``: how far llama.cpp's log-probabilities are off, with the adapter and
    without, and how far the adapter moves them."""

    def run(model, **arguments):
        write_gguf(model.get_base_model(), tmp_path / "base.gguf")
        model.save_pretrained(tmp_path / "adapter")
        export_gguf(tmp_path / "adapter", model, tmp_path / "adapter.gguf", **arguments)
        # In turns, so that an answer from the cache of another scale would be noticed.
        prompts = [(prompt, [scale]) for scale in (0.0, 1.0) for prompt in PROMPTS]
        found = llama_cpp.next_tokens(
            tmp_path / "base.gguf", [tmp_path / "adapter.gguf"], prompts, VOCABULARY
        )
        with model.disable_adapter():
            without = next_token_of(model, PROMPTS)
        wanted = next_token_of(model, PROMPTS)
        differences = (found - torch.cat([without, wanted])).abs().split(len(PROMPTS))
        return differences[1].max(), differences[0].max(), (wanted - without).abs().max()

    return run


def adapted(model, config=growing, grow=None, **settings):
    every = {"target_modules": targets(model), "target_parameters": parameters(model)}
    settings = {"r": 3, "lora_alpha": 6} | (settings if "target_modules" in settings else every | settings)
    model = get_peft_model(model, config(**settings))
    if grow is not None:
        grow(model)
    else:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("kind", SETTINGS)
def test_llama_cpp_gives_what_the_model_gives(kind, compared, grow):
    difference, of_base, moved = compared(adapted(decoder(kind), grow=grow))
    bound = OF_GEMMA if kind.startswith("Gemma") else TOLERANCE
    assert of_base < bound
    assert difference < bound
    assert moved > 1.0


RANKS = {
    "uniform": {"config": IncreLoraConfig},
    "rslora": {"config": growing, "use_rslora": True},
    "patterns": {
        "config": growing,
        "rank_pattern": {"k_proj": 5, "down_proj": 1},
        "alpha_pattern": {"v_proj": 3, "0.self_attn.q_proj": 20},
        "init_r": 2,
    },
    "paper": {"config": IncreLoraConfig.paper},
    "SoRA": {"config": SoraConfig},
    "MELoRA": {"config": MeLoraConfig, "n_slices": 2, "r": 2},
    "MoRA": {"config": MoraConfig, "mora_type": 1},
}


@pytest.mark.parametrize("case", RANKS)
def test_every_scale_and_rank_is_right(case, compared):
    difference, _, moved = compared(adapted(decoder(), target_modules=LAYER, **RANKS[case]))
    assert difference < TOLERANCE
    assert moved > 0.3


OF_EXPERTS = {
    "one projection": {"target_parameters": ["experts.down_proj"], "target_modules": []},
    "the router": {"target_parameters": ["mlp.gate.weight"], "target_modules": []},
    "rslora, patterns": {
        "use_rslora": True,
        "rank_pattern": {r"down_proj\.[02]": 1, "gate.weight": 1, "q_proj": 5},
        "alpha_pattern": {"gate_up_proj": 3, r"down_proj.3": 20},
    },
}


@pytest.mark.parametrize("case", OF_EXPERTS)
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_every_scale_and_rank_of_experts_is_right(kind, case, compared):
    difference, _, moved = compared(adapted(decoder(kind), **OF_EXPERTS[case]))
    assert difference < TOLERANCE
    assert moved > 0.05


@pytest.mark.parametrize("heads", [1, 4])
def test_heads_of_keys_may_be_one_or_as_many_as_those_of_queries(heads, compared, grow):
    difference, _, moved = compared(adapted(decoder(num_key_value_heads=heads), grow=grow))
    assert difference < TOLERANCE
    assert moved > 1.0


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_a_tied_base_is_right_without_the_embedding(kind, compared, grow):
    difference, _, moved = compared(adapted(decoder(kind, tie_word_embeddings=True), grow=grow))
    assert difference < TOLERANCE
    assert moved > 1.0


def test_float16_costs_its_rounding(compared, grow):
    difference, _, moved = compared(adapted(decoder(), grow=grow), dtype=torch.float16)
    assert TOLERANCE < difference < 0.02
    assert moved > 1.0


def test_a_part_of_the_scale_is_a_part_of_the_update(grow, tmp_path):
    model = adapted(decoder(), grow=grow)
    write_gguf(model.get_base_model(), tmp_path / "base.gguf")
    export_gguf(model, model, tmp_path / "adapter.gguf")
    prompts = [(prompt, [0.5]) for prompt in PROMPTS]
    found = llama_cpp.next_tokens(tmp_path / "base.gguf", [tmp_path / "adapter.gguf"], prompts, VOCABULARY)
    for layer in model.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(0.5)
    torch.testing.assert_close(found, next_token_of(model, PROMPTS), rtol=0.0, atol=TOLERANCE)
