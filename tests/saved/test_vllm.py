"""Exports in vLLM itself: the next token's probabilities beside PEFT's model, and its own loading code beside
the rules of `consumers.py`."""

import json

import consumers
import mixtures
import pytest
import torch
import vllm_python
from adapted_experts import MORE_TARGETS
from decoders import LAYER, VOCABULARY, decoder, next_token_of
from growing import growing
from increlora_rs import export_lora
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from test_export_separate import separated

pytestmark = [vllm_python.needed, pytest.mark.slow]
PROMPTS = [[5, 17, 40, 8, 61], [90, 3, 33, 12, 7, 25, 70, 71, 6, 44, 58, 19]]
LAYOUTS = ["uniform", "compact"]


@pytest.fixture
def exports(grow, tmp_path):
    """A model with an adapter of ranks from 1 to 3, and the directories of its base and of both exports."""
    # Its attention wants heads of 32 or more.
    base = decoder("Llama", hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    base.save_pretrained(tmp_path / "base")
    config = growing(r=3, lora_alpha=6, target_modules=LAYER, alpha_pattern={"v_proj": 3})
    model = get_peft_model(base, config).eval()
    grow(model)
    for layout in LAYOUTS:
        export_lora(model, tmp_path / layout, layout)
    return model, tmp_path


def test_vllm_gives_what_the_model_gives(exports):
    model, path = exports
    found = vllm_python.ask(
        base=str(path / "base"),
        adapters=[str(path / layout) for layout in LAYOUTS],
        prompts=PROMPTS,
        vocabulary=VOCABULARY,
        max_lora_rank=8,
    )
    base, *with_adapter = torch.tensor(found, dtype=torch.float64)
    wanted = next_token_of(model, PROMPTS)
    with model.disable_adapter():
        torch.testing.assert_close(base, next_token_of(model, PROMPTS), rtol=0.0, atol=1e-4)
    assert (wanted - base).abs().max() > 1.0
    for logprobs in with_adapter:
        torch.testing.assert_close(logprobs, wanted, rtol=0.0, atol=1e-4)


# What a model of vLLM's own asks of the sizes.
_SIZES = {"hidden_size": 128, "head_dim": 32, "mlp_only_layers": [], "bos_token_id": 1, "eos_token_id": 2}
_OF = {
    "Mixtral": _SIZES,
    "Qwen3Moe": _SIZES,
    "Qwen2Moe": _SIZES,
    "Phimoe": _SIZES,
    "DeepseekV3": _SIZES
    | dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 32)
    | {"topk_method": "noaux_tc"},
}


@pytest.mark.parametrize("name", _OF)
def test_vllm_holds_the_update_of_each_expert(name, grow, tmp_path):
    """Its kernel of experts with LoRA runs on GPUs only; what it would multiply by is looked at."""
    base = mixtures.build(name, **_OF[name])
    base.save_pretrained(tmp_path / "base")
    # As the published checkpoint calls the class; Transformers' name leads to no model of vLLM's own.
    described = tmp_path / "base" / "config.json"
    described.write_text(described.read_text().replace("PhimoeForCausalLM", "PhiMoEForCausalLM"))
    config = growing(r=2, target_modules=["o_proj"], target_parameters=MORE_TARGETS[name])
    model = get_peft_model(base, config)
    grow(model)
    paths = [tmp_path / layout for layout in (*LAYOUTS, "fused")]
    for path in paths[:2]:
        export_lora(model, path, path.name, experts="separate")
    export_lora(model, paths[2])
    *taken, of_fused = vllm_python.ask(
        slots=[str(path) for path in paths], base=str(tmp_path / "base"), max_lora_rank=8
    )
    assert taken == [None, None]
    for path in paths[:2]:
        found = load_file(path / "slots.safetensors")
        for key, wanted in separated(name, model).items():
            holder, experts, projection = key.rpartition(".experts.")
            if key.endswith(".o_proj"):
                continue
            if experts:
                number, projection = projection.split(".")
                part = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.get(projection, projection)
                held = found[f"{holder}.experts.{part}"][int(number)]
            else:
                held = found[key]
            torch.testing.assert_close(held.double(), wanted, rtol=1e-5, atol=1e-5)
    if name == "Mixtral":
        # It knows no module of these names, and says nothing.
        assert not any(update.any() for update in load_file(paths[2] / "slots.safetensors").values())
    else:
        assert of_fused is not None


def changed(path, to, options=None, tensors=None):
    """The adapter ``path`` with other options, or tensors, in the directory ``to``."""
    to.mkdir()
    config = json.loads((path / "adapter_config.json").read_text()) | (options or {})
    (to / "adapter_config.json").write_text(json.dumps(config))
    old = load_file(path / "adapter_model.safetensors")
    save_file(old if tensors is None else tensors, to / "adapter_model.safetensors")
    return to


def experts(ranks):
    prefix = "base_model.model.model.layers.0.mlp.experts."
    return {
        f"{prefix}{expert}.{name}.lora_{factor}.weight": torch.ones((rank, 8) if factor == "A" else (8, rank))
        for (expert, name), rank in ranks.items()
        for factor in "AB"
    }


def test_the_rules_written_down_are_vllms(exports):
    _, path = exports
    compact, uniform = path / "compact", path / "uniform"
    every = [(expert, name) for expert in range(2) for name in ("gate_proj", "up_proj", "down_proj")]
    key = "base_model.model.model.{}.base_layer.weight"
    embeddings = {
        f"base_model.model.model.embed_tokens.lora_embedding_{factor}": torch.ones(shape)
        for factor, shape in (("A", (2, 99)), ("B", (32, 2)))
    }
    head = {"base_model.model.score.weight": torch.ones(3, 32)}
    options = [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "gaussian"},
        {"alora_invocation_tokens": [1]},
        {"layer_replication": [[0, 2]]},
        {"use_bdlora": {"nblocks": 2}},
        {"use_qalora": True},
        {"rank_pattern": {"q_proj": 16}},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": []},
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 5, "v_proj": 7}, "use_rslora": True},
    ]
    of_tensors = [
        {"base_model.model.model.norm.weight": torch.ones(8)},
        embeddings,
        embeddings | {key.format("embed_tokens"): torch.ones(99, 32)},
        embeddings | {key.format("wte"): torch.ones(99, 32)},
        experts(dict.fromkeys(every, 2)),
        experts(dict.fromkeys(every, 2) | {(1, "up_proj"): 3}),
        experts(dict.fromkeys(every[:-1], 2)),
    ]
    cases = [(compact, 8), (uniform, 8), (compact, 1)]
    cases += [(changed(compact, path / f"options{k}", given), 8) for k, given in enumerate(options)]
    cases += [(changed(compact, path / f"tensors{k}", {}, given), 8) for k, given in enumerate(of_tensors)]
    cases += [
        (changed(compact, path / f"head{k}", {"modules_to_save": heads}, head), 8)
        for k, heads in enumerate((["score"], ["score", "classifier"]))
    ]
    modules = [*LAYER, "embed_tokens", "lm_head"]
    said = vllm_python.ask(checks=[[str(case), rank, modules, 99] for case, rank in cases])
    taken = 0
    for (case, rank), refusal in zip(cases, said, strict=True):
        if refusal is not None:
            with pytest.raises(consumers.Refused):
                consumers.vllm(case, rank, modules=modules, vocabulary=99)
            continue
        taken += 1
        found = consumers.vllm(case, rank, modules=modules, vocabulary=99)
        theirs = load_file(case / "updates.safetensors")
        assert found.keys() == theirs.keys(), case
        for name, update in theirs.items():
            update = update.T if name.endswith("embed_tokens") else update
            torch.testing.assert_close(found[name], update.double(), rtol=1e-5, atol=1e-5)
    assert 8 < taken < len(cases) - 8
