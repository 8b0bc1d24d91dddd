"""Exports under readers that are installed here: PEFT's hot swap, diffusers."""

import pytest
import torch
import unets
from growing import growing
from increlora_rs import IncreLoraConfig, attach, export_lora
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

layouts = pytest.mark.parametrize("layout", ["uniform", "compact"])


@pytest.fixture
def two_exports(make_bert, grow, tokens, tmp_path):
    """``two_exports(**arguments)``: directories of two adapters of unequal ranks, and their logits."""

    def run(**arguments):
        found = []
        for k, ranks in enumerate(([1, 2, 3, 1], [4, 1, 1, 2])):
            config = growing(r=3, lora_alpha=6 + k, target_modules=["query", "value"])
            model = get_peft_model(make_bert(), config).eval()
            names = [
                f"bert.encoder.layer.{j // 2}.attention.self." + ("query", "value")[j % 2] for j in range(4)
            ]
            grow(model, dict(zip(names, ranks, strict=True)), seed=k)
            export_lora(model, tmp_path / str(k), **arguments)
            with torch.no_grad():
                found.append((tmp_path / str(k), model(tokens).logits))
        return found

    return run


def test_exports_of_one_rank_are_hot_swapped(two_exports, make_bert, tokens):
    (first, _), (second, wanted) = two_exports(rank=8)
    model = PeftModel.from_pretrained(make_bert(), first).eval()
    hotswap_adapter(model, second, adapter_name="default")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=0.0, atol=1e-5)


def test_compact_exports_are_not(two_exports, make_bert):
    (first, _), (second, _) = two_exports(layout="compact")
    model = PeftModel.from_pretrained(make_bert(), first)
    with pytest.raises(ValueError, match="alpha_pattern"):
        hotswap_adapter(model, second, adapter_name="default")


def test_a_hot_swap_between_exports_of_one_rank_keeps_every_shape(two_exports, make_bert):
    # So that a compiled model, or a server's slots, need nothing anew.
    (first, _), (second, _) = two_exports(rank=8)
    model = PeftModel.from_pretrained(make_bert(), first)
    before = {name: (parameter.shape, id(parameter)) for name, parameter in model.named_parameters()}
    hotswap_adapter(model, second, adapter_name="default")
    assert {name: (p.shape, id(p)) for name, p in model.named_parameters()} == before


@pytest.fixture
def adapted_unet(grow):
    """A UNet with an adapter of ranks from 1 to 3 on linear layers and convolutions, as diffusers adds it."""
    model = unets.unet()
    model.add_adapter(growing(r=3, target_modules=["to_q", "to_k", "to_out.0", "conv1", "proj_in"]))
    grow(model)
    return model


@layouts
def test_diffusers_loads_an_export_of_its_model(adapted_unet, tmp_path, layout):
    export_lora(adapted_unet, tmp_path, layout)
    model = unets.unet()
    model.load_lora_adapter(tmp_path, prefix="base_model.model", weight_name="adapter_model.safetensors")
    torch.testing.assert_close(unets.sample(model), unets.sample(adapted_unet), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("form", [growing, IncreLoraConfig], ids=["grows", "moves"])
def test_diffusers_loads_the_export_of_a_training(form, tmp_path):
    model = unets.unet()
    model.add_adapter(form(r=3, lora_alpha=6, target_modules=["to_q", "to_v", "conv1", "proj_in"]))
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-2)
    scheduler = attach(model, optimizer, total_steps=40)
    first = dict(scheduler.ranks)
    for _ in range(40):
        (unets.noise(model) - 1.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scheduler.ranks != first
    export_lora(model.eval(), tmp_path)
    loaded = unets.unet()
    loaded.load_lora_adapter(tmp_path, prefix="base_model.model", weight_name="adapter_model.safetensors")
    assert (unets.sample(unets.unet()) - unets.sample(model)).abs().max() > 0.1
    torch.testing.assert_close(unets.sample(loaded), unets.sample(model), rtol=0.0, atol=1e-5)


def test_what_diffusers_saves_itself_is_refused_when_it_is_loaded(adapted_unet, tmp_path):
    # The reason for the way above; docs/troubleshooting.md says so.
    adapted_unet.save_lora_adapter(tmp_path)
    with pytest.raises(Exception, match=r"."):
        unets.unet().load_lora_adapter(tmp_path, prefix=None)
