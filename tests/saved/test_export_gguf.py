"""Adapters as GGUF files, under the rules of llama.cpp's loader; in itself they run in test_llama_cpp.py."""

import builtins
import re

import consumers
import gguf
import numpy as np
import pytest
import torch
from decoders import LAYER, SETTINGS, decoder, parameters, targets, updates
from gguf_models import ARCHITECTURES, CONVERTERS, interleaved, separated, write_gguf
from growing import growing
from increlora_rs import IncreLoraConfig, PriLoraConfig, export_gguf
from increlora_rs.saved.gguf_bases import LAYOUTS, gguf_base
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig


@pytest.fixture
def model(grow):
    """A Llama with ranks from 1 to 3 on every module, and unequal alphas."""
    return adapted(decoder(), grow)


def adapted(base, grow=None, config=growing, **settings):
    every = {"target_modules": targets(base), "target_parameters": parameters(base)}
    settings = {"r": 2, "lora_alpha": 6} | (settings if "target_modules" in settings else every | settings)
    model = get_peft_model(base, config(**settings))
    if grow is not None:
        grow(model)
    return model.eval()


def assert_right(path, model, tolerance=1e-6):
    """The file beside the base's has the model's updates, by the base's names, in the order of its rows."""
    base = model.get_base_model()
    write_gguf(base, path.with_name("base.gguf"))
    found = consumers.llama_cpp_file(path, path.with_name("base.gguf"))
    architecture, interleaves, _ = CONVERTERS[type(base).__name__]
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], base.config.num_hidden_layers)
    heads = {"q_proj": base.config.num_attention_heads, "k_proj": base.config.num_key_value_heads}
    wanted, experts = {}, {}
    for name, update in updates(model).items():
        if ".experts." in name:
            experts.setdefault(name.rpartition(".")[0], []).append(update.numpy())
            continue
        name = name.removesuffix(".weight")
        kind = name.rpartition(".")[2]
        numbers = (
            interleaved(update.numpy(), heads[kind]) if interleaves and kind in heads else update.numpy()
        )
        wanted[f"{names.get_name(name)}.weight"] = torch.tensor(numbers)
    for name, each in experts.items():
        for part, numbers in separated(name, np.stack(each)).items():
            wanted[names.get_name(part, (".weight",))] = torch.tensor(numbers)
    assert set(found) == set(wanted)
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("kind", SETTINGS)
def test_updates_are_the_models_in_the_order_of_the_bases_rows(kind, grow, tmp_path):
    model = adapted(decoder(kind), grow, alpha_pattern={"o_proj": 3}, use_rslora=True)
    export_gguf(model, model, tmp_path / "adapter.gguf")
    assert_right(tmp_path / "adapter.gguf", model)


def test_every_class_that_is_written_is_tested():
    assert set(LAYOUTS) == {f"{kind}ForCausalLM" for kind in SETTINGS} == set(CONVERTERS)


def test_a_directory_gives_the_file_that_the_model_gives(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    export_gguf(model, model, tmp_path / "model.gguf")
    export_gguf(tmp_path / "saved", model, tmp_path / "directory.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "directory.gguf").read_bytes()


def test_each_matrix_keeps_its_rank(model, tmp_path):
    export = export_gguf(model, model, tmp_path / "adapter.gguf")
    ranks = {
        tensor.name.removesuffix(".lora_b"): tensor.data.shape[1]
        for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors
        if tensor.name.endswith(".lora_b")
    }
    assert export.ranks == ranks
    assert export.architecture == "llama"
    assert set(ranks.values()) == {1, 2, 3}
    assert (
        ranks["blk.0.attn_q.weight"]
        == model.get_submodule("model.model.layers.0.self_attn.q_proj").r["default"]
    )


def test_alpha_is_a_float(model, tmp_path):
    """llama.cpp reads it as one without asking for its type."""
    export_gguf(model, model, tmp_path / "adapter.gguf")
    field = gguf.GGUFReader(tmp_path / "adapter.gguf").get_field("adapter.lora.alpha")
    assert field.types == [gguf.GGUFValueType.FLOAT32]
    assert field.contents() == 3.0


@pytest.mark.parametrize("source", ["model", "directory"])
def test_float16_is_half_the_size(model, tmp_path, source):
    model.save_pretrained(tmp_path / "saved")
    adapter = model if source == "model" else tmp_path / "saved"
    export_gguf(adapter, model, tmp_path / "half.gguf", dtype=torch.float16)
    tensors = gguf.GGUFReader(tmp_path / "half.gguf").tensors
    assert {tensor.data.dtype for tensor in tensors} == {np.dtype(np.float16)}
    assert_right(tmp_path / "half.gguf", model, 2e-3)


def test_modules_of_rank_0_are_left_out(tmp_path):
    model = adapted(decoder(), init_r=0, rank_pattern={"q_proj": 2})
    export = export_gguf(model, model, tmp_path / "adapter.gguf")
    assert set(export.ranks) == {"blk.0.attn_q.weight", "blk.1.attn_q.weight"}


def test_the_experts_of_a_projection_have_the_largest_of_their_ranks(grow, tmp_path):
    pattern = {r"0\..*gate_up_proj": 0, r"0\..*down_proj.[013]": 0, "mlp.gate.weight": 0}
    model = adapted(decoder("Qwen3Moe"), init_r=1, rank_pattern=pattern)
    grow(model, {"model.layers.1.mlp.experts.gate_up_proj.2": 3})
    export = export_gguf(model, model, tmp_path / "adapter.gguf")
    ranks = {name: rank for name, rank in export.ranks.items() if "exps" in name or "inp" in name}
    assert ranks == {
        "blk.0.ffn_down_exps.weight": 1,
        "blk.1.ffn_gate_exps.weight": 3,
        "blk.1.ffn_up_exps.weight": 3,
        "blk.1.ffn_down_exps.weight": 1,
    }
    write_gguf(model.get_base_model(), tmp_path / "base.gguf")
    found = consumers.llama_cpp_file(tmp_path / "adapter.gguf", tmp_path / "base.gguf")
    acting = found["blk.0.ffn_down_exps.weight"].flatten(1).any(1)
    assert acting.tolist() == [False, False, True, False]


def test_experts_of_a_base_without_them_are_refused(grow, tmp_path):
    model = adapted(decoder("Mixtral"), grow)
    with pytest.raises(ValueError, match=r"the adapter is on the experts .*gate_up_proj.*Merge"):
        export_gguf(model, decoder().config, tmp_path / "adapter.gguf")


def test_an_adapter_of_rank_0_is_refused(tmp_path):
    model = adapted(decoder(), init_r=0)
    with pytest.raises(ValueError, match=r"each of the 16 modules has rank 0.*train it"):
        export_gguf(model, model, tmp_path / "adapter.gguf")


def test_other_methods_are_written_the_same_way(grow, tmp_path):
    model = adapted(decoder(), config=PriLoraConfig, target_modules=LAYER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    export_gguf(model, model, tmp_path / "adapter.gguf")
    assert_right(tmp_path / "adapter.gguf", model, 1e-5)


# The base.


@pytest.mark.parametrize(
    "form", ["model", "plain model", "configuration", "directory", "path", "named by the adapter"]
)
def test_the_base_is_given_in_any_form(form, tmp_path, grow):
    decoder(num_key_value_heads=1).save_pretrained(tmp_path / "base")
    plain = type(decoder()).from_pretrained(tmp_path / "base")
    model = adapted(plain, grow)
    model.save_pretrained(tmp_path / "saved")
    base = {
        "model": model,
        "plain model": decoder(num_key_value_heads=1),
        "configuration": plain.config,
        "directory": str(tmp_path / "base"),
        "path": tmp_path / "base",
        "named by the adapter": None,
    }[form]
    export_gguf(tmp_path / "saved", base, tmp_path / "adapter.gguf")
    assert_right(tmp_path / "adapter.gguf", model)


def test_a_configuration_that_names_no_class_means_its_language_model():
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=5)
    base = gguf_base(config)
    assert (base.name, base.heads, base.kv_heads, base.layers, base.tied) == (
        "LlamaForCausalLM",
        8,
        2,
        5,
        False,
    )


def test_an_adapter_that_names_no_base_needs_one(model, tmp_path):
    model.peft_config["default"].base_model_name_or_path = None
    with pytest.raises(ValueError, match=r"base=None: .* give the model, its configuration or its directory"):
        export_gguf(model, None, tmp_path / "adapter.gguf")


def test_a_class_that_was_not_tried_is_refused_by_name(model, tmp_path):
    with pytest.raises(
        ValueError, match=r"its class is BertForMaskedLM, .*tried are LlamaForCausalLM, .*Merge"
    ):
        export_gguf(model, BertConfig(architectures=["BertForMaskedLM"]), tmp_path / "adapter.gguf")
    classifier = AutoModelForSequenceClassification.from_config(decoder().config)
    with pytest.raises(ValueError, match="its class is LlamaForSequenceClassification"):
        export_gguf(model, classifier, tmp_path / "adapter.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("base", "error", "words"),
    [
        (3, TypeError, "base: a int is no model, configuration of Transformers, directory or name"),
        (nn.Linear(2, 2), ValueError, "base: a Linear has no configuration of Transformers"),
        (
            "nowhere/at/all",
            ValueError,
            r"base='nowhere/at/all' leads to no configuration .*Give the directory",
        ),
    ],
)
def test_what_is_no_base_is_refused_by_name(model, tmp_path, base, error, words):
    with pytest.raises(error, match=re.compile(words, re.DOTALL)):
        export_gguf(model, base, tmp_path / "adapter.gguf")


def test_a_base_of_fewer_layers_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"base: it has 1 layers, and the adapter is on 'model\.layers\.1"):
        export_gguf(model, decoder(num_hidden_layers=1), tmp_path / "adapter.gguf")


def test_a_base_of_other_heads_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"base: it has 3 heads, and .* blk\.0\.attn_q\.weight has 32 rows"):
        export_gguf(
            model,
            LlamaConfig(num_attention_heads=3, hidden_size=48, num_key_value_heads=1),
            tmp_path / "adapter.gguf",
        )


# What llama.cpp does not apply.


@pytest.mark.parametrize(("kind", "settings"), [("Llama", {"tie_word_embeddings": True}), ("Gemma3", {})])
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")
def test_the_embedding_of_a_tied_base_is_refused(kind, settings, module, tmp_path):
    model = adapted(decoder(kind, **settings), target_modules=["q_proj", module])
    with pytest.raises(ValueError, match=rf"{module}', and the base's embedding is its head too .*Merge"):
        export_gguf(model, model, tmp_path / "adapter.gguf")


def test_a_module_that_llama_cpp_has_no_adapter_for_is_refused(model, tmp_path):
    base = decoder()
    base.extra = nn.Linear(4, 4)
    other = adapted(base, target_modules=["extra", "q_proj"])
    with pytest.raises(
        ValueError, match=r"the adapter is on 'extra', .*'self_attn\.q_proj'.*Merge.*target_modules"
    ):
        export_gguf(other, other, tmp_path / "adapter.gguf")


def test_a_convolution_is_refused(tmp_path):
    base = decoder()
    base.conv = nn.Conv1d(3, 4, 3)
    model = adapted(base, target_modules=["conv", "q_proj"])
    with pytest.raises(ValueError, match="the adapter is on 'conv'"):
        export_gguf(model, model, tmp_path / "adapter.gguf")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["norm"]}, r"modules_to_save=\['norm'\]"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"trainable_token_indices": [5, 6]}, r"trainable_token_indices=\[5, 6\]"),
    ],
)
@pytest.mark.parametrize("source", ["model", "directory"])
def test_what_is_trained_beside_the_update_is_refused(settings, words, source, tmp_path):
    model = adapted(decoder("Qwen2"), config=IncreLoraConfig, target_modules=["q_proj"], **settings)
    model.save_pretrained(tmp_path / "saved")
    adapter = model if source == "model" else tmp_path / "saved"
    with pytest.raises(ValueError, match=rf"trained with {words}, which llama\.cpp does not apply\. Merge"):
        export_gguf(adapter, model, tmp_path / "adapter.gguf")


# The file.


def test_an_interrupted_export_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "adapter.gguf"
    export_gguf(model, model, path)
    before = path.read_bytes()

    def fail(writer):
        raise OSError("no space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(OSError, match="no space left"):
        export_gguf(model, model, path, dtype=torch.float16)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_export_replaces_an_old_one(model, tmp_path):
    path = tmp_path / "new" / "adapter.gguf"
    export_gguf(model, model, path, dtype=torch.float16)
    export_gguf(model, model, path)
    assert_right(path, model)


def test_a_torn_file_is_replaced(model, tmp_path):
    path = tmp_path / "adapter.gguf"
    export_gguf(model, model, path)
    path.write_bytes(path.read_bytes()[:100])
    export_gguf(model, model, path)
    assert_right(path, model)


def test_a_model_is_not_overwritten(model, tmp_path):
    path = tmp_path / "base.gguf"
    write_gguf(model.get_base_model(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"out='.*base\.gguf' is a model"):
        export_gguf(model, model, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["adapter", "adapter.safetensors", "folder.gguf"])
def test_a_name_that_is_no_gguf_files_is_refused(model, tmp_path, name):
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ValueError, match=rf"out='.*{name}' must be the name of a file that ends in \.gguf"):
        export_gguf(model, model, tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8, "float16", None])
def test_another_dtype_is_refused(model, tmp_path, dtype):
    with pytest.raises(ValueError, match=r"dtype=.* must be torch\.float32 or torch\.float16"):
        export_gguf(model, model, tmp_path / "adapter.gguf", dtype=dtype)


def test_a_number_too_large_for_float16_is_named(model, tmp_path):
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.1.mlp.up_proj.lora_A" in n)[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"dtype=torch\.float16: A of blk\.1\.ffn_up\.weight holds 1e\+06"):
        export_gguf(model, model, tmp_path / "adapter.gguf", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_error_says_what_to_install(model, tmp_path, monkeypatch):
    importing = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "increlora_rs\[gguf\]"'):
        export_gguf(model, model, tmp_path / "adapter.gguf")
