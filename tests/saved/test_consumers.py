"""Exports under the loading rules of vLLM, TGI and llama.cpp, as `consumers.py` has them."""

import json

import consumers
import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, export_lora
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
forms = pytest.mark.parametrize("form", [growing, IncreLoraConfig.paper], ids=["default", "paper"])


@pytest.fixture
def model(make_llama, grow):
    """``model(form)``: a Llama with ranks from 1 to 3 and unequal alphas."""

    def build(form=growing):
        config = form(target_modules=MODULES, r=2, lora_alpha=6, alpha_pattern={"v_proj": 3}, use_rslora=True)
        model = get_peft_model(make_llama(), config)
        grow(model)
        return model

    return build


def assert_right(found, model):
    layers = {short(n): layer for n, layer in adapted_layers(model, "default").items()}
    assert set(found) == set(layers)
    for name, layer in layers.items():
        wanted = layer.get_delta_weight("default").double()
        torch.testing.assert_close(found[name], wanted, rtol=0.0, atol=1e-5)


@forms
@pytest.mark.parametrize("arguments", [{}, {"rank": 16}, {"vllm_rank": True}], ids=["largest", "16", "vllm"])
def test_uniform_export_is_right_everywhere(model, tmp_path, form, arguments):
    model = model(form)
    export = export_lora(model, tmp_path, **arguments)
    assert_right(consumers.vllm(tmp_path, export.max_lora_rank), model)
    assert_right(consumers.tgi(tmp_path), model)
    assert_right(consumers.llama_cpp(tmp_path), model)


@forms
def test_compact_export_is_right_in_vllm_alone(model, tmp_path, form):
    model = model(form)
    export = export_lora(model, tmp_path, "compact")
    assert_right(consumers.vllm(tmp_path, export.max_lora_rank), model)
    with pytest.raises(consumers.Refused, match="stack"):
        consumers.tgi(tmp_path)
    with pytest.raises(AssertionError):
        assert_right(consumers.llama_cpp(tmp_path), model)


@pytest.mark.parametrize("rank", [1, 3, 8, 9, 100, 512])
def test_told_max_lora_rank_is_the_smallest_that_vllm_loads(model, tmp_path, rank):
    export = export_lora(model(), tmp_path, rank=rank)
    consumers.vllm(tmp_path, export.max_lora_rank)
    smaller = [taken for taken in consumers.MAX_LORA_RANKS if taken < export.max_lora_rank]
    if smaller:
        with pytest.raises(consumers.Refused, match="greater than max_lora_rank"):
            consumers.vllm(tmp_path, smaller[-1])


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_rank_and_alpha_are_told_by_module_where_patterns_tell_them(model, tmp_path, layout):
    # An adapter of one scale cannot tell the pattern's from it.
    model = model()
    export_lora(model, tmp_path, layout)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    config["alpha_pattern"] = {key: 2 * alpha for key, alpha in config["alpha_pattern"].items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = consumers.vllm(tmp_path, 8)
    assert_right({name: update / 2 for name, update in found.items()}, model)


# What vLLM has names for.


def edited(path, **options):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | options))


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"alora_invocation_tokens": [1]},
        {"layer_replication": [[0, 2]]},
        {"use_bdlora": {"nblocks": 2}},
        {"use_qalora": True},
        {"rank_pattern": {"q_proj": 16}},
        {"modules_to_save": ["norm"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_vllm_refuses_options_of_which_an_export_sets_none(model, tmp_path, options):
    export_lora(model(), tmp_path, "compact")
    consumers.vllm(tmp_path, 8)
    edited(tmp_path, **options)
    with pytest.raises(consumers.Refused):
        consumers.vllm(tmp_path, 8)


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_vllm_finds_the_modules_of_an_export_in_its_model(model, tmp_path, layout):
    export_lora(model(), tmp_path, layout)
    consumers.vllm(tmp_path, 8, modules=MODULES)
    with pytest.raises(consumers.Refused, match=r"received model\.layers\.0\.mlp\.down_proj"):
        consumers.vllm(tmp_path, 8, modules=[name for name in MODULES if name != "down_proj"])


def test_vllm_takes_embeddings_of_its_vocabulary(make_llama, grow, tmp_path):
    model = get_peft_model(make_llama(), growing(target_modules=["q_proj", "embed_tokens", "lm_head"]))
    grow(model)
    export_lora(model, tmp_path)
    assert_right(consumers.vllm(tmp_path, 8, vocabulary=99), model)
    with pytest.raises(consumers.Refused, match="vocabulary"):
        consumers.vllm(tmp_path, 8, vocabulary=100)
    # As PEFT itself saves them.
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file(tensors | {key: torch.zeros(99, 32)}, tmp_path / "adapter_model.safetensors")
    assert_right(consumers.vllm(tmp_path, 8, vocabulary=99), model)
    key = key.replace("embed_tokens", "wte")
    save_file(tensors | {key: torch.zeros(99, 32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(consumers.Refused, match="unsupported LoRA weight"):
        consumers.vllm(tmp_path, 8)


@pytest.mark.parametrize(("head", "taken"), [("score", True), ("norm", False)])
def test_vllm_takes_the_head_of_a_classifier_and_nothing_else(make_llama, grow, tmp_path, head, taken):
    base = AutoModelForSequenceClassification.from_config(make_llama().config)
    model = get_peft_model(base, growing(target_modules=["q_proj"], modules_to_save=[head]))
    grow(model)
    export_lora(model, tmp_path)
    if taken:
        assert_right(consumers.vllm(tmp_path, 8), model)
    else:
        with pytest.raises(consumers.Refused, match="norm"):
            consumers.vllm(tmp_path, 8)


EXPERTS = [(expert, name) for expert in range(2) for name in ("gate_proj", "up_proj", "down_proj")]


@pytest.mark.parametrize(
    ("ranks", "refused"),
    [
        (dict.fromkeys(EXPERTS, 2), None),
        (dict.fromkeys(EXPERTS, 2) | {(1, "up_proj"): 3}, "different LoRA ranks"),
        ({key: 2 + ("up_proj" in key) for key in EXPERTS}, None),
        (dict.fromkeys(EXPERTS[:-1], 2), "lack a projection"),
        ({key: 2 for key in EXPERTS if "up_proj" not in key}, "lack a projection"),
    ],
    ids=["one rank", "two ranks", "a rank a projection", "an expert without one", "no third one"],
)
def test_vllm_wants_every_expert_and_one_rank_a_projection(model, tmp_path, ranks, refused):
    export_lora(model(), tmp_path)
    tensors = {}
    for (expert, name), rank in ranks.items():
        prefix = f"base_model.model.model.layers.0.mlp.experts.{expert}.{name}.lora_"
        tensors |= {f"{prefix}A.weight": torch.ones(rank, 8), f"{prefix}B.weight": torch.ones(8, rank)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if refused is None:
        assert len(consumers.vllm(tmp_path, 8)) == 6
    else:
        with pytest.raises(consumers.Refused, match=refused):
            consumers.vllm(tmp_path, 8)


@pytest.mark.parametrize("read", [lambda path: consumers.vllm(path, 512), consumers.llama_cpp])
def test_our_own_directory_is_refused_rather_than_misread(model, tmp_path, read):
    model().save_pretrained(tmp_path)
    with pytest.raises(consumers.Refused, match="lora_"):
        read(tmp_path)


def test_llama_cpps_converter_drops_norms_and_refuses_other_modules(make_llama, grow, tmp_path):
    for trained, refused in (("norm", False), ("lm_head", True)):
        config = growing(target_modules=["q_proj"], modules_to_save=[trained])
        model = get_peft_model(make_llama(), config)
        grow(model)
        export_lora(model, tmp_path / trained)
        if refused:
            with pytest.raises(consumers.Refused, match="lm_head"):
                consumers.llama_cpp(tmp_path / trained)
        else:
            assert_right(consumers.llama_cpp(tmp_path / trained), model)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_llama_cpp_has_no_update_of_a_tied_embedding(make_llama, grow, tmp_path, module):
    model = get_peft_model(make_llama(), growing(target_modules=["q_proj", module]))
    grow(model)
    export_lora(model, tmp_path)
    assert_right(consumers.llama_cpp(tmp_path), model)
    with pytest.raises(consumers.Refused, match="head"):
        consumers.llama_cpp(tmp_path, tied=True)
