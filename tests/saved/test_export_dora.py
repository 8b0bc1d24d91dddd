"""DoRA on disk: under PEFT's names, exported to PEFT's DoRA, made of it, refused where nothing applies it."""

import json

import pytest
import torch
from every_kind import IDS, TARGETS, EveryKind
from growing import growing
from increlora_rs import convert_lora, export_gguf, export_lora
from increlora_rs.layers.found import adapted_layers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
layouts = pytest.mark.parametrize("layout", ["uniform", "compact"])
sources = pytest.mark.parametrize("source", ["model", "directory"])
# The convolution has nothing but its magnitude.
RANKS = {"emb": 2, "conv": 0, "lin": 4}


def base_of():
    torch.manual_seed(7)
    return EveryKind().double()


def near(found, wanted, tolerance=1e-9):
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=tolerance)


def off_start(model, adapter="default"):
    """The model, whose trained numbers were all moved."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.empty(parameter.shape).normal_(0.0, 0.2, generator=generator)
                parameter += noise.to(parameter)
    return model.eval()


@pytest.fixture
def model():
    """An adapter of unequal ranks on a layer of each kind."""
    config = growing(r=4, init_r=1, lora_alpha=6, target_modules=TARGETS, use_dora=True, rank_pattern=RANKS)
    return off_start(get_peft_model(base_of(), config))


def source_of(model, source, tmp_path):
    if source == "model":
        return model
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_adapter_has_pefts_names(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    sizes = {"emb": 6, "conv": 8, "lin": 5}
    for name, size in sizes.items():
        assert tensors[f"base_model.model.{name}.lora_magnitude_vector"].shape == (size,)
    assert json.loads((tmp_path / CONFIG).read_text())["use_dora"] is True


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_gives_the_same_outputs(model, tmp_path, low_cpu_mem_usage):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    near(loaded.eval()(IDS), model(IDS), 1e-12)
    assert {
        n: layer.r["default"] for n, layer in adapted_layers(loaded.base_model.model, "default").items()
    } == RANKS


@sources
@layouts
def test_peft_gives_the_same_outputs_from_an_export(model, tmp_path, source, layout):
    made = export_lora(source_of(model, source, tmp_path), tmp_path / "plain", layout)
    assert made.config.use_dora
    assert made.error == 0.0
    loaded = PeftModel.from_pretrained(base_of(), tmp_path / "plain").eval()
    assert type(loaded.base_model.model.lin).__module__.startswith("peft.tuners.lora")
    near(loaded(IDS), model(IDS))


def test_an_export_in_half_precision_keeps_the_magnitudes(model, tmp_path):
    export_lora(model, tmp_path / "plain", dtype=torch.bfloat16)
    for key, tensor in load_file(tmp_path / "plain" / WEIGHTS).items():
        assert tensor.dtype == (torch.float64 if "magnitude" in key else torch.bfloat16), key


@pytest.fixture
def peft_dora():
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, use_dora=True, rank_pattern={"lin": 2})
    return off_start(get_peft_model(base_of(), config))


@sources
def test_a_dora_of_peft_becomes_an_adapter_that_gives_the_same_outputs(peft_dora, tmp_path, source):
    config = convert_lora(source_of(peft_dora, source, tmp_path), tmp_path / "ours")
    assert config.use_dora
    loaded = PeftModel.from_pretrained(base_of(), tmp_path / "ours").eval()
    near(loaded(IDS), peft_dora(IDS))
    found = {n: layer.r["default"] for n, layer in adapted_layers(loaded.base_model.model, "default").items()}
    assert found == {"emb": 3, "conv": 3, "lin": 2}


def damaged(model, path, change):
    model.save_pretrained(path)
    tensors = load_file(path / WEIGHTS)
    key = "base_model.model.lin.lora_magnitude_vector"
    change(tensors, key)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    return path


def _without(tensors, key):
    del tensors[key]


def _short(tensors, key):
    tensors[key] = tensors[key][:2].clone()


def _infinite(tensors, key):
    tensors[key][0] = torch.inf


DAMAGE = [(_without, "lora_magnitude_vector"), (_short, r"\(2,\)"), (_infinite, "NaN or infinite")]


@pytest.mark.parametrize(("change", "told"), DAMAGE, ids=["missing", "short", "infinite"])
def test_a_damaged_magnitude_is_refused_by_name(model, tmp_path, change, told):
    path = damaged(model, tmp_path, change)
    with pytest.raises(ValueError, match=told):
        PeftModel.from_pretrained(base_of(), path)
    with pytest.raises(ValueError, match=told):
        export_lora(path, tmp_path / "plain")


def test_an_adapter_without_magnitudes_is_not_loaded_over_one_with_them(model, tmp_path):
    plain = growing(r=4, init_r=1, lora_alpha=6, target_modules=TARGETS, rank_pattern=RANKS)
    get_peft_model(base_of(), plain).save_pretrained(tmp_path)
    before = model(IDS)
    with pytest.raises(ValueError, match="use_dora=False"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(IDS), before)


def test_llama_cpps_format_refuses_it_by_name(make_llama, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    base = make_llama()
    model = get_peft_model(base, growing(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match=r"use_dora=True.*merge_and_unload"):
        export_gguf(model, base.config, tmp_path / "adapter.gguf")
