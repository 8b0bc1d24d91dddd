"""Export to plain LoRA: the same outputs in a process that knows nothing of increlora_rs."""

import json

import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, export_lora
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

RANKS = {
    "bert.encoder.layer.0.attention.self.query": 1,
    "bert.encoder.layer.0.attention.self.value": 4,
    "bert.encoder.layer.1.attention.self.query": 2,
    "bert.encoder.layer.1.attention.self.value": 3,
}
LARGEST = max(RANKS.values())
HIDDEN = 32
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

layouts = pytest.mark.parametrize("layout", ["uniform", "compact"])
forms = pytest.mark.parametrize("form", [growing, IncreLoraConfig.paper], ids=["default", "paper"])
sources = pytest.mark.parametrize("source", ["model", "directory"])

SETTINGS = {
    "as it is": {},
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"layer.1.attention.self.query": 24, "value": 3}},
    "both": {"use_rslora": True, "alpha_pattern": {"value": 24}},
    "modules_to_save": {"modules_to_save": ["classifier"]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "trainable tokens": {"trainable_token_indices": {"word_embeddings": [1, 5]}},
    "regex": {"target_modules": r".*\.self\.(query|value)"},
    "layers": {"layers_to_transform": [0, 1], "layers_pattern": "layer"},
    "exclude": {"target_modules": ["query", "value", "key"], "exclude_modules": ["key"]},
    "task": {"task_type": "SEQ_CLS"},
}


def configure(form, **kwargs):
    return form(**({"target_modules": ["query", "value"], "r": 3, "lora_alpha": 6} | kwargs))


@pytest.fixture
def train(make_bert, grow):
    """``train(config)``: a BERT grown to RANKS, whatever else is trainable changed too."""

    def run(config, dtype=torch.float32, **kwargs):
        model = get_peft_model(make_bert().to(dtype), config, **kwargs)
        grow(model, RANKS, reserve=1 if config.uses_reserve else 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter += 0.3
        return model.eval()

    return run


def exported(model, source, tmp_path, *args, **kwargs):
    """Exports from the model or from its saved directory; the directory written."""
    if source == "directory":
        model.save_pretrained(tmp_path / "adapter")
        model = tmp_path / "adapter"
    export_lora(model, tmp_path / "plain", *args, **kwargs)
    return tmp_path / "plain"


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def config_of(path):
    return json.loads((path / CONFIG).read_text())


def assert_same(answer, wanted, tolerance):
    found = torch.tensor(answer["logits"], dtype=wanted.dtype)
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=tolerance)


@forms
@layouts
@pytest.mark.parametrize("arguments", SETTINGS.values(), ids=SETTINGS)
def test_plain_peft_gets_the_same_outputs_from_a_directorys_export(
    train, plain_peft, bert_dir, tokens, tmp_path, form, layout, arguments
):
    model = train(configure(form, **arguments), torch.float64)
    path = exported(model, "directory", tmp_path, layout)
    assert_same(plain_peft(bert_dir, path, tokens, "float64"), logits(model, tokens), 1e-9)


@layouts
@pytest.mark.parametrize("name", ["as it is", "both", "modules_to_save", "bias all"])
def test_plain_peft_gets_the_same_outputs_from_a_models_export(
    train, plain_peft, bert_dir, tokens, tmp_path, layout, name
):
    model = train(configure(IncreLoraConfig.paper, **SETTINGS[name]), torch.float64)
    path = exported(model, "model", tmp_path, layout)
    assert_same(plain_peft(bert_dir, path, tokens, "float64"), logits(model, tokens), 1e-9)


@forms
@layouts
def test_plain_peft_gets_the_same_outputs_in_float32(
    train, plain_peft, bert_dir, tokens, tmp_path, form, layout
):
    model = train(configure(form))
    path = exported(model, "directory", tmp_path, layout)
    assert_same(plain_peft(bert_dir, path, tokens), logits(model, tokens), 5e-6)


def test_the_process_of_these_tests_never_imports_increlora(train, plain_peft, bert_dir, tokens, tmp_path):
    path = exported(train(configure(growing)), "model", tmp_path)
    answer = plain_peft(bert_dir, path, tokens)
    assert answer["knows_increlora"] is False
    assert "peft.tuners.lora.layer" in answer["classes"]


def test_exported_adapter_differs_from_the_base(train, make_bert, tokens):
    model = train(configure(growing))
    assert (logits(model, tokens) - logits(make_bert(), tokens)).abs().max() > 0.1


@layouts
def test_bfloat16_adapter_is_exported_near_enough(train, make_bert, tokens, tmp_path, layout):
    model = train(configure(growing), torch.bfloat16, autocast_adapter_dtype=False)
    path = exported(model, "model", tmp_path, layout)
    loaded = PeftModel.from_pretrained(make_bert().bfloat16(), path, autocast_adapter_dtype=False)
    wanted = logits(model, tokens)
    torch.testing.assert_close(logits(loaded.eval(), tokens), wanted, rtol=0.05, atol=0.02)


@layouts
def test_bfloat16_adapter_stays_bfloat16(train, tmp_path, layout):
    model = train(configure(growing), torch.bfloat16, autocast_adapter_dtype=False)
    tensors = load_file(exported(model, "model", tmp_path, layout) / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_bfloat16_base_with_float32_adapter_gives_the_same_outputs(
    train, plain_peft, bert_dir, tokens, tmp_path
):
    model = train(configure(growing), torch.bfloat16)
    answer = plain_peft(bert_dir, exported(model, "directory", tmp_path), tokens, "bfloat16")
    assert_same(answer, logits(model, tokens).float(), 0.1)


# The tensors.


@forms
@sources
def test_uniform_tensors_are_a_and_b_of_one_rank(train, tmp_path, form, source):
    path = exported(train(configure(form)), source, tmp_path)
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(path / WEIGHTS).items()}
    wanted = {f"base_model.model.{name}.lora_A.weight": (LARGEST, HIDDEN) for name in RANKS}
    wanted |= {f"base_model.model.{name}.lora_B.weight": (HIDDEN, LARGEST) for name in RANKS}
    assert shapes == wanted


@forms
@sources
def test_compact_tensors_have_each_their_modules_rank(train, tmp_path, form, source):
    path = exported(train(configure(form)), source, tmp_path, "compact")
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(path / WEIGHTS).items()}
    wanted = {f"base_model.model.{name}.lora_A.weight": (rank, HIDDEN) for name, rank in RANKS.items()}
    wanted |= {f"base_model.model.{name}.lora_B.weight": (HIDDEN, rank) for name, rank in RANKS.items()}
    assert shapes == wanted


@forms
@layouts
@pytest.mark.parametrize("arguments", [SETTINGS["as it is"], SETTINGS["both"]], ids=["plain", "scaled"])
def test_b_times_a_is_the_update_with_scale_one(train, tmp_path, form, layout, arguments):
    model = train(configure(form, **arguments))
    tensors = load_file(exported(model, "model", tmp_path, layout) / WEIGHTS)
    for name, layer in adapted_layers(model, "default").items():
        product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        torch.testing.assert_close(product, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


def test_padding_is_zero(train, tmp_path):
    tensors = load_file(exported(train(configure(growing)), "model", tmp_path) / WEIGHTS)
    for name, rank in RANKS.items():
        assert not tensors[f"base_model.model.{name}.lora_A.weight"][rank:].any()
        assert not tensors[f"base_model.model.{name}.lora_B.weight"][:, rank:].any()


def test_file_says_that_it_is_of_torch(train, tmp_path):
    path = exported(train(configure(growing)), "model", tmp_path)
    with safe_open(path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@layouts
@pytest.mark.parametrize(
    ("setting", "extra"),
    [
        ("modules_to_save", ["classifier.bias", "classifier.weight"]),
        (
            "bias lora_only",
            sorted(f"{name}.base_layer.bias" for name in RANKS),
        ),
    ],
)
def test_other_trained_tensors_are_carried_over(train, tmp_path, layout, setting, extra):
    model = train(configure(growing, **SETTINGS[setting]))
    tensors = load_file(exported(model, "directory", tmp_path, layout) / WEIGHTS)
    others = sorted(key for key in tensors if "lora_" not in key)
    assert others == [f"base_model.model.{name}" for name in extra]
    for key in others:
        stored = key.replace("classifier.", "classifier.modules_to_save.default.")
        assert torch.equal(tensors[key], model.state_dict()[stored])


# The configuration.


@forms
@sources
@pytest.mark.parametrize("arguments", [SETTINGS["as it is"], SETTINGS["both"]], ids=["plain", "scaled"])
def test_uniform_configuration_has_one_rank_and_scale_one(train, tmp_path, form, source, arguments):
    config = config_of(exported(train(configure(form, **arguments)), source, tmp_path))
    found = {key: config[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")}
    assert found == {
        "r": LARGEST,
        "lora_alpha": LARGEST,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }


@sources
def test_compact_configuration_has_alpha_equal_to_rank_everywhere(train, tmp_path, source):
    config = config_of(exported(train(configure(growing)), source, tmp_path, "compact"))
    wanted = {f"^{name}": rank for name, rank in RANKS.items()}
    assert {key.replace("\\", ""): rank for key, rank in config["rank_pattern"].items()} == wanted
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["lora_alpha"] == config["r"] == LARGEST


@layouts
def test_configuration_is_plain_loras(train, tmp_path, layout):
    path = exported(train(configure(growing, lora_dropout=0.2)), "model", tmp_path, layout)
    config = config_of(path)
    fields = {key: config[key] for key in ("peft_type", "inference_mode", "lora_dropout", "bias", "use_dora")}
    assert fields == {
        "peft_type": "LORA",
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
    }
    assert set(config) == set(LoraConfig().to_dict())


@sources
def test_configuration_keeps_what_concerns_the_base_model(bert_dir, grow, tmp_path, source):
    base = AutoModelForSequenceClassification.from_pretrained(bert_dir)
    model = get_peft_model(base, configure(growing, task_type="SEQ_CLS", revision="v2"))
    grow(model, RANKS)
    config = config_of(exported(model, source, tmp_path))
    assert config["base_model_name_or_path"] == str(bert_dir)
    assert (config["task_type"], config["revision"]) == ("SEQ_CLS", "v2")
    assert sorted(config["target_modules"]) == ["query", "value"]
    assert sorted(config["modules_to_save"]) == ["classifier", "score"]


@layouts
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_configuration_keeps_the_bias_setting(train, tmp_path, layout, bias):
    path = exported(train(configure(growing, bias=bias)), "model", tmp_path, layout)
    assert config_of(path)["bias"] == bias


def test_written_configuration_is_returned(train, tmp_path):
    config = export_lora(train(configure(growing)), tmp_path).config
    assert type(config) is LoraConfig
    assert (config.r, config.lora_alpha) == (LARGEST, LARGEST)


# A smaller rank.


def dense_updates(model):
    return {
        short(name): layer.get_delta_weight("default").double()
        for name, layer in adapted_layers(model, "default").items()
    }


def written_updates(path):
    tensors = {key: tensor.double() for key, tensor in load_file(path / WEIGHTS).items()}
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {short(n): tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in names}


@forms
@layouts
@pytest.mark.parametrize("rank", range(1, LARGEST))
def test_smaller_rank_gives_the_nearest_update(train, tmp_path, form, layout, rank):
    model = train(configure(form, **SETTINGS["both"]), torch.float64)
    found = written_updates(exported(model, "model", tmp_path, layout, rank))
    for name, update in dense_updates(model).items():
        u, s, v = torch.linalg.svd(update)
        nearest = u[:, :rank] * s[:rank] @ v[:rank]
        torch.testing.assert_close(found[name], nearest, rtol=0.0, atol=1e-10)


@sources
@layouts
def test_smaller_rank_reports_what_each_module_lost(train, tmp_path, source, layout):
    model = train(configure(growing), torch.float64)
    wanted = {name: update.detach() for name, update in dense_updates(model).items()}
    if source == "directory":
        model.save_pretrained(tmp_path / "adapter")
        model = tmp_path / "adapter"
    export = export_lora(model, tmp_path / "plain", layout, 2)
    found = written_updates(tmp_path / "plain")
    errors = {n: float((found[n] - update).norm() / update.norm()) for n, update in wanted.items()}
    assert export.errors == pytest.approx(errors, abs=1e-9)
    assert [name for name, error in export.errors.items() if error > 0.01] == [
        n for n in RANKS if RANKS[n] > 2
    ]
    lost = sum(float((found[n] - update).square().sum()) for n, update in wanted.items())
    whole = sum(float(update.square().sum()) for update in wanted.values())
    assert export.error == pytest.approx((lost / whole) ** 0.5)


@layouts
def test_exact_export_reports_no_error(train, tmp_path, layout):
    export = export_lora(train(configure(growing)), tmp_path, layout)
    assert (export.errors, export.error) == (dict.fromkeys(RANKS, 0.0), 0.0)


@layouts
def test_smaller_rank_is_the_rank_of_files_and_configuration(train, make_bert, tmp_path, layout):
    path = exported(train(configure(growing)), "directory", tmp_path, layout, 2)
    loaded = PeftModel.from_pretrained(make_bert(), path)
    ranks = {short(n): m.r["default"] for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert ranks == {n: 2 if layout == "uniform" else min(rank, 2) for n, rank in RANKS.items()}
    assert {m.scaling["default"] for m in loaded.modules() if hasattr(m, "lora_A")} == {1.0}
    assert (config_of(path)["r"], config_of(path)["lora_alpha"]) == (2, 2)


def test_an_update_of_zero_loses_nothing(make_bert, tmp_path):
    model = get_peft_model(make_bert(), configure(growing, init_r=3))
    export = export_lora(model, tmp_path, rank=1)
    assert export.error == 0.0
    assert set(export.errors.values()) == {0.0}


# For vLLM.


@pytest.mark.parametrize(("rank", "wanted"), [(None, 8), (1, 1), (2, 8), (9, 16), (16, 16), (257, 320)])
def test_vllm_rank_rounds_up_to_one_that_vllm_takes(train, tmp_path, rank, wanted):
    model = train(configure(growing), torch.float64)
    export = export_lora(model, tmp_path, rank=rank, vllm_rank=True)
    assert (export.config.r, export.config.lora_alpha, export.max_lora_rank) == (wanted, wanted, wanted)
    assert {t.shape[0] for key, t in load_file(tmp_path / WEIGHTS).items() if "lora_A" in key} == {wanted}
    if wanted >= LARGEST:
        found = written_updates(tmp_path)
        for name, update in dense_updates(model).items():
            torch.testing.assert_close(found[name], update, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(("rank", "wanted"), [(None, 8), (8, 8), (9, 16), (33, 64), (512, 512), (513, None)])
def test_needed_max_lora_rank_is_told(train, tmp_path, rank, wanted):
    assert export_lora(train(configure(growing)), tmp_path, rank=rank).max_lora_rank == wanted


def test_vllm_rank_above_all_is_refused_with_the_largest(train, tmp_path):
    with pytest.raises(ValueError, match="vllm_rank=True: the rank is 513, and vLLM takes at most 512"):
        export_lora(train(configure(growing)), tmp_path, rank=513, vllm_rank=True)


def test_vllm_rank_must_be_a_truth_value(train, tmp_path):
    with pytest.raises(ValueError, match="vllm_rank=8"):
        export_lora(train(configure(growing)), tmp_path, vllm_rank=8)


# Dtypes.


@sources
@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_have_the_asked_dtype(train, tmp_path, source, layout, dtype):
    model = train(configure(growing, modules_to_save=["classifier"]))
    path = exported(model, source, tmp_path, layout, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(path / WEIGHTS).values()} == {dtype}


def test_bfloat16_file_of_a_float32_adapter_gives_nearly_the_same_outputs(
    train, plain_peft, bert_dir, tokens, tmp_path
):
    model = train(configure(growing))
    path = exported(model, "directory", tmp_path, dtype=torch.bfloat16)
    assert_same(plain_peft(bert_dir, path, tokens), logits(model, tokens), 0.05)


def test_bfloat16_directory_of_others_is_exported(train, make_bert, tokens, tmp_path):
    model = train(configure(growing), torch.bfloat16, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path / "adapter")
    path = exported(model, "directory", tmp_path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(make_bert(), path).eval()
    model = PeftModel.from_pretrained(make_bert(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0.0, atol=1e-5)


def test_value_too_large_for_the_dtype_is_named(train, tmp_path):
    model = train(configure(growing))
    next(iter(adapted_layers(model, "default").values())).lora_B["default"].data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"dtype=torch.float16: .*query.lora_B.weight holds .*bfloat16"):
        export_lora(model, tmp_path / "plain", dtype=torch.float16)
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", 16])
def test_dtype_that_is_none_is_refused(train, tmp_path, dtype):
    with pytest.raises(TypeError, match="dtype="):
        export_lora(train(configure(growing)), tmp_path, dtype=dtype)


def test_adapter_saved_without_safetensors_is_exported(train, make_bert, tokens, tmp_path):
    model = train(configure(growing))
    model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    export_lora(tmp_path / "adapter", tmp_path / "plain")
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "plain").eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0.0, atol=5e-6)


# Arguments.


@pytest.mark.parametrize("rank", [LARGEST, LARGEST + 1, 16, 40])
def test_rank_pads_to_the_asked_one(train, plain_peft, bert_dir, tokens, tmp_path, rank):
    model = train(configure(growing), torch.float64)
    path = exported(model, "model", tmp_path, rank=rank)
    assert {t.shape[0] for key, t in load_file(path / WEIGHTS).items() if "lora_A" in key} == {rank}
    assert (config_of(path)["r"], config_of(path)["lora_alpha"]) == (rank, rank)
    assert_same(plain_peft(bert_dir, path, tokens, "float64"), logits(model, tokens), 1e-9)


@pytest.mark.parametrize("rank", [0, -2])
@layouts
def test_rank_below_one_is_refused(train, tmp_path, rank, layout):
    with pytest.raises(ValueError, match=f"rank={rank} "):
        export_lora(train(configure(growing)), tmp_path / "plain", layout, rank)


@pytest.mark.parametrize("rank", ["8", 8.0])
def test_rank_of_a_wrong_type_is_refused_by_name_and_value(train, tmp_path, rank):
    with pytest.raises(TypeError, match=f"rank={rank!r}"):
        export_lora(train(configure(growing)), tmp_path / "plain", rank=rank)


def test_rank_above_the_largest_is_refused_in_the_compact_layout(train, tmp_path):
    with pytest.raises(ValueError, match=rf"rank=8 is above .*{LARGEST}"):
        export_lora(train(configure(growing)), tmp_path / "plain", "compact", 8)


@pytest.mark.parametrize("layout", ["dense", "", None])
def test_unknown_layout_is_refused_with_the_choices(train, tmp_path, layout):
    with pytest.raises(ValueError, match=rf"layout={layout!r} .*'uniform'.*'compact'"):
        export_lora(train(configure(growing)), tmp_path / "plain", layout)


@pytest.mark.parametrize(
    "arguments",
    [
        {"layout": "dense"},
        {"rank": 0},
        {"adapter_name": "nobody"},
        {"layout": "compact", "vllm_rank": True},
    ],
)
def test_refused_export_writes_nothing(train, tmp_path, arguments):
    with pytest.raises(ValueError):
        export_lora(train(configure(growing)), tmp_path / "plain", **arguments)
    assert not (tmp_path / "plain").exists()


def test_named_adapter_is_exported(train, grow, make_bert, tokens, tmp_path):
    model = train(configure(growing))
    model.add_adapter("other", configure(IncreLoraConfig.paper))
    grow(model, {name: 6 - rank for name, rank in RANKS.items()}, adapter_name="other", seed=1)
    model.set_adapter("other")
    export_lora(model, tmp_path, adapter_name="other")
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(model.eval(), tokens), rtol=0.0, atol=5e-6)


@layouts
def test_exported_model_is_left_as_it_was(train, tokens, tmp_path, layout):
    model = train(configure(IncreLoraConfig.paper))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_lora(model, tmp_path, layout)
    after = model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_adapter_of_a_single_rank_is_exported(make_bert, tokens, tmp_path):
    model = get_peft_model(make_bert(), configure(growing, init_lora_weights=False)).eval()
    loaded = PeftModel.from_pretrained(make_bert(), exported(model, "directory", tmp_path)).eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0.0, atol=5e-6)


def test_model_that_is_not_of_transformers_is_exported(make_plain, grow, plain_input, tmp_path):
    model = get_peft_model(make_plain(), growing(target_modules=["lin0", "lin1"]))
    ranks = grow(model)
    export_lora(model, tmp_path, "compact")
    loaded = PeftModel.from_pretrained(make_plain(), tmp_path).eval()
    torch.testing.assert_close(loaded(plain_input), model.eval()(plain_input), rtol=0.0, atol=1e-5)
    found = {short(n): m.r["default"] for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert found == ranks


def test_module_whose_name_ends_anothers_keeps_its_rank_in_the_compact_layout(grow, tmp_path):
    def build():
        return nn.ModuleDict({"lin": nn.Linear(8, 8), "outer": nn.ModuleDict({"lin": nn.Linear(8, 8)})})

    model = get_peft_model(build(), growing(target_modules=["lin"]))
    grow(model, {"lin": 5, "outer.lin": 2})
    export_lora(model, tmp_path, "compact")
    loaded = PeftModel.from_pretrained(build(), tmp_path).base_model.model
    assert (loaded["lin"].r["default"], loaded["outer"]["lin"].r["default"]) == (5, 2)


def test_failed_export_leaves_an_old_one(train, tmp_path, monkeypatch):
    model = train(configure(growing))
    export_lora(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(LoraConfig, "save_pretrained", fail)
    with pytest.raises(OSError):
        export_lora(model, tmp_path, rank=16)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_export_into_the_adapters_own_directory_is_refused(make_plain, tmp_path):
    get_peft_model(make_plain(), growing(r=2, target_modules=["lin0"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is the directory of the adapter itself"):
        export_lora(tmp_path, tmp_path)
