"""Export and conversion of modules that are no nn.Linear: Conv1D, embeddings, convolutions."""

import json
from collections import OrderedDict

import consumers
import pytest
import torch
from growing import growing
from increlora_rs import convert_lora, export_lora
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def gpt2():
    config = GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32, num_labels=3, initializer_range=0.2
    )
    config.pad_token_id = 0
    return GPT2ForSequenceClassification(config)


def convolutions(dim):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    return nn.Sequential(
        layer(3, 8, 3, stride=2, padding=1, bias=True),
        nn.ReLU(),
        # PEFT's LoRA forgets a dilation.
        layer(8, 6, (2, 3, 1)[:dim], bias=False),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def words():
    return nn.Sequential(OrderedDict(words=nn.Embedding(20, 12, padding_idx=0), head=nn.Linear(12, 5)))


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


TOKENS = torch.randint(1, 20, (3, 7), generator=torch.Generator().manual_seed(1))
# A base model, an input, and target modules of which some are of a kind of their own.
CASES = {
    "Conv1D": (gpt2, TOKENS, ["c_attn", "c_proj", "score"]),
    "Embedding": (words, torch.cat([TOKENS, torch.zeros(3, 1, dtype=torch.long)], 1), ["words", "head"]),
    "Conv1d": (lambda: convolutions(1), numbers(2, 3, 13), ["0", "2", "4"]),
    "Conv2d": (lambda: convolutions(2), numbers(2, 3, 13, 14), ["0", "2", "4"]),
    "Conv3d": (lambda: convolutions(3), numbers(2, 3, 13, 14, 9), ["0", "2", "4"]),
}
sources = pytest.mark.parametrize("source", ["model", "directory"])
layouts = pytest.mark.parametrize("layout", ["uniform", "compact"])


@pytest.fixture(params=CASES)
def case(request):
    """Builds the base model, always with the same weights; an input; target modules."""
    build, x, targets = CASES[request.param]

    def seeded():
        torch.manual_seed(7)
        model = build().double().eval()
        x_double = x.double() if x.is_floating_point() else x
        with torch.no_grad():
            model(x_double)
        return model

    return seeded, x.double() if x.is_floating_point() else x, targets


def output(model, x):
    with torch.no_grad():
        y = model.eval()(x)
    return getattr(y, "logits", y)


@pytest.fixture
def grown(case, grow):
    """``grown(**arguments)``: the case's model with ranks from 1 to 3."""

    def run(**arguments):
        build, _, targets = case
        config = growing(target_modules=targets, r=3, lora_alpha=6, **arguments)
        model = get_peft_model(build(), config)
        grow(model)
        return model

    return run


def exported(model, source, tmp_path, *args, **kwargs):
    if source == "directory":
        model.save_pretrained(tmp_path / "adapter")
        model = tmp_path / "adapter"
    export_lora(model, tmp_path / "plain", *args, **kwargs)
    return tmp_path / "plain"


@sources
@layouts
def test_export_gives_the_same_outputs(case, grown, tmp_path, source, layout):
    build, x, _ = case
    model = grown(alpha_pattern={"head": 2, "0": 5, "c_proj": 3})
    path = exported(model, source, tmp_path, layout)
    loaded = PeftModel.from_pretrained(build(), path)
    assert type(next(m for m in loaded.modules() if hasattr(m, "lora_A"))).__module__.startswith("peft.")
    torch.testing.assert_close(output(loaded, x), output(model, x), rtol=0.0, atol=1e-10)
    assert (output(loaded, x) - output(build(), x)).abs().max() > 1e-3


@pytest.mark.slow
def test_export_gives_the_same_outputs_in_a_process_without_increlora(case, grown, tmp_path, plain_peft):
    build, x, _ = case
    model = grown()
    path = exported(model, "directory", tmp_path)
    torch.save(build(), tmp_path / "base.pt")
    found = plain_peft(tmp_path / "base.pt", path, x, "float64")
    assert found["knows_increlora"] is False
    there = torch.tensor(found["logits"], dtype=torch.float64)
    torch.testing.assert_close(there, output(model, x), rtol=1e-6, atol=1e-6)


@sources
@layouts
def test_smaller_rank_is_the_nearest_update_of_each_kind(case, grown, tmp_path, source, layout):
    build, _, _ = case
    model = grown()
    path = exported(model, source, tmp_path, layout, 2)
    loaded = PeftModel.from_pretrained(build(), path)
    plain = {short(name): m for name, m in loaded.named_modules() if hasattr(m, "lora_A")}
    for name, layer in adapted_layers(model, "default").items():
        wanted = layer.get_delta_weight("default")
        found = plain[short(name)].get_delta_weight("default")
        matrix = wanted.flatten(1)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        nearest = (u[:, :2] * s[:2] @ v[:2]).view(wanted.shape)
        torch.testing.assert_close(found, nearest, rtol=0.0, atol=1e-10)


def test_keys_and_shapes_are_loras(case, grown, tmp_path):
    build, _, targets = case
    path = exported(grown(), "directory", tmp_path, rank=3)
    plain = get_peft_model(build(), LoraConfig(r=3, target_modules=targets))
    plain.save_pretrained(tmp_path / "wanted", save_embedding_layers=False)
    wanted = load_file(tmp_path / "wanted" / WEIGHTS)
    found = load_file(path / WEIGHTS)
    assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in wanted.items()}


def test_fan_in_fan_out_is_kept_for_conv1d(case, grown, tmp_path):
    model = grown()
    config = json.loads((exported(model, "directory", tmp_path) / CONFIG).read_text())
    assert config["fan_in_fan_out"] is isinstance(model.base_model.model, GPT2ForSequenceClassification)


@pytest.fixture
def lora(case):
    """``lora(**arguments)``: the case's model with a plain LoRA that is not at its start."""

    def run(**arguments):
        build, _, targets = case
        model = get_peft_model(build(), LoraConfig(target_modules=targets, r=3, lora_alpha=6, **arguments))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter += torch.empty_like(parameter).normal_(0.0, 0.2, generator=generator)
                # The padding gets no gradient.
                if "lora_embedding_A" in name:
                    parameter[:, 0] = 0.0
        return model

    return run


@sources
@pytest.mark.parametrize("arguments", [{}, {"use_rslora": True, "alpha_pattern": {"0": 2, "words": 3}}])
def test_converted_lora_gives_the_same_outputs(case, lora, tmp_path, source, arguments):
    build, x, _ = case
    model = lora(**arguments)
    if source == "directory":
        model.save_pretrained(tmp_path / "lora")
    convert_lora(model if source == "model" else tmp_path / "lora", tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    torch.testing.assert_close(output(loaded, x), output(model, x), rtol=0.0, atol=1e-9)
    assert (output(loaded, x) - output(build(), x)).abs().max() > 1e-3


def test_converted_lora_is_exported_without_a_model_in_between(case, lora, tmp_path):
    build, x, _ = case
    model = lora()
    convert_lora(model, tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "plain")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "plain")
    torch.testing.assert_close(output(loaded, x), output(model, x), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_weighted_sum_is_exact(case, grown, grow, tmp_path, kind):
    build, x, targets = case
    model = grown()
    model.add_adapter("other", growing(target_modules=targets, r=2, lora_alpha=3))
    grow(model, adapter_name="other", seed=1)
    model.add_weighted_adapter(
        ["default", "other"], [0.7, -1.3], "sum", kind, svd_rank=None if kind == "cat" else 8
    )
    for layer in adapted_layers(model, "sum").values():
        wanted = 0.7 * layer.get_delta_weight("default") - 1.3 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("sum"), wanted, rtol=0.0, atol=1e-10)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(build(), tmp_path / "sum")
    torch.testing.assert_close(output(loaded, x), output(model, x), rtol=0.0, atol=1e-10)


# A language model's embeddings, which servers read too.


@pytest.fixture
def llama(make_llama, grow):
    config = growing(target_modules=["embed_tokens", "lm_head", "q_proj"], r=2)
    model = get_peft_model(make_llama(), config)
    grow(model)
    return model


@sources
def test_frozen_embedding_weights_are_not_exported(llama, tmp_path, source):
    keys = load_file(exported(llama, source, tmp_path) / WEIGHTS)
    assert [key for key in keys if "lora_" not in key] == []


def test_exported_embeddings_are_right_in_vllm_and_llama_cpp(llama, tmp_path):
    path = exported(llama, "directory", tmp_path)
    for found in (consumers.vllm(path, 8), consumers.llama_cpp(path)):
        layers = {short(name): layer for name, layer in adapted_layers(llama, "default").items()}
        assert set(found) == set(layers)
        for name, layer in layers.items():
            wanted = layer.get_delta_weight("default").double()
            torch.testing.assert_close(found[name], wanted, rtol=0.0, atol=1e-5)


# What is refused.


@pytest.mark.parametrize("kinds", [3, {"words": 3}, {"words": "word"}, {"words": ["3"]}, {3: "embedding"}])
def test_wrong_module_kinds_are_refused_by_name(kinds):
    with pytest.raises((TypeError, ValueError), match="module_kinds"):
        growing(module_kinds=kinds)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}])
@sources
def test_convolutions_that_lora_computes_otherwise_are_refused_by_name(options, source, tmp_path):
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, **options))
    model = get_peft_model(base, growing(r=2, target_modules=["0", "1"]))
    if source == "directory":
        model.save_pretrained(tmp_path / "adapter")
        model = tmp_path / "adapter"
    with pytest.raises(
        ValueError, match=r"\['1'\] are convolutions with a dilation or a padding_mode.*Merge"
    ):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
