"""Exports under the loading rules of vLLM, TGI and llama.cpp, as `consumers.py` has them."""

import consumers
import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, export_lora
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short
from peft import get_peft_model

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
