"""LoRA's options on whole models of transformers, for every kind of module: GPT-2, BERT, Llama, ViT, T5."""

import warnings

import pytest
import torch
from growing import growing
from increlora_rs import attach
from increlora_rs.layers import Convolution, Embedding, Linear, TransposedLinear
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

IDS = torch.randint(0, 99, (2, 7), generator=torch.Generator().manual_seed(1))


def seeded(build):
    torch.manual_seed(7)
    return build().eval()


def gpt2(**kwargs):
    config = GPT2Config(
        vocab_size=99,
        n_embd=24,
        n_layer=3,
        n_head=4,
        n_positions=16,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        **kwargs,
    )
    return seeded(lambda: GPT2LMHeadModel(config))


def vit():
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return seeded(lambda: ViTForImageClassification(config))


def t5():
    config = T5Config(
        vocab_size=99,
        d_model=24,
        d_kv=6,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return seeded(lambda: T5ForConditionalGeneration(config))


def adapted(model, **kwargs):
    torch.manual_seed(3)
    return get_peft_model(model, growing(**({"r": 3, "lora_alpha": 6} | kwargs)))


def layers_of(model, name="default"):
    return {short(key): layer for key, layer in adapted_layers(model, name).items()}


def train(model, inputs, steps=30):
    """Trains with a scheduler attached; gives it and the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = attach(model, optimizer, total_steps=steps)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return scheduler, losses


LANGUAGE = {"input_ids": IDS, "labels": IDS}


def reloaded(model, base, path):
    model.save_pretrained(path)
    return PeftModel.from_pretrained(base, path).eval()


def test_gpt2_has_default_targets():
    assert list(layers_of(adapted(gpt2()))) == [f"transformer.h.{i}.attn.c_attn" for i in range(3)]


def test_all_linear_adapts_the_conv1d_of_gpt2_but_its_head(tmp_path):
    model = adapted(gpt2(), target_modules="all-linear")
    layers = layers_of(model)
    assert {type(layer) for layer in layers.values()} == {TransposedLinear}
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(layers) == [f"transformer.h.{i}.{name}" for i in range(3) for name in names]
    scheduler, losses = train(model, LANGUAGE)
    assert scheduler.total_rank == scheduler.budget == 36
    assert losses[-1] < 0.7 * losses[0]
    loaded = reloaded(model, gpt2(), tmp_path)
    assert {n: layer.r["default"] for n, layer in layers_of(loaded).items()} == scheduler.ranks
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_all_linear_of_a_second_adapter_finds_the_same_modules():
    model = adapted(gpt2(), target_modules="all-linear")
    model.add_adapter("other", growing(r=2, target_modules="all-linear"))
    assert list(layers_of(model, "other")) == list(layers_of(model))


@pytest.mark.parametrize("build", ["make_bert", "make_llama"])
def test_all_linear_adapts_the_linear_layers(build, request):
    base = request.getfixturevalue(build)()
    linear = [n for n, m in base.named_modules() if isinstance(m, nn.Linear)]
    model = adapted(base, target_modules="all-linear", task_type="SEQ_CLS" if build == "make_bert" else None)
    head = {"make_bert": "classifier", "make_llama": "lm_head"}[build]
    assert [n for n in linear if not n.endswith(head)] == list(layers_of(model))


def test_exclude_modules_leaves_modules_out():
    model = adapted(gpt2(), target_modules=["c_attn", "wte"], exclude_modules=["h.1.attn.c_attn"])
    wanted = ["transformer.wte", "transformer.h.0.attn.c_attn", "transformer.h.2.attn.c_attn"]
    assert list(layers_of(model)) == wanted


@pytest.mark.parametrize("pattern", [None, "h"])
def test_layers_to_transform_picks_layers(pattern):
    model = adapted(
        gpt2(), target_modules=["c_attn", "c_fc"], layers_to_transform=[0, 2], layers_pattern=pattern
    )
    wanted = [f"transformer.h.{i}.{name}" for i in (0, 2) for name in ("attn.c_attn", "mlp.c_fc")]
    assert list(layers_of(model)) == wanted


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_set_ranks_and_alphas_of_every_kind(rslora):
    model = adapted(
        gpt2(),
        target_modules=["wte", "c_attn"],
        init_r=2,
        rank_pattern={"wte": 3, "h.1.attn.c_attn": 1},
        alpha_pattern={"wte": 12},
        use_rslora=rslora,
    )
    layers = layers_of(model)
    assert [layer.r["default"] for layer in layers.values()] == [3, 2, 1, 2]
    divisor = 3**0.5 if rslora else 3
    scales = [layer.scaling["default"] for layer in layers.values()]
    assert scales == pytest.approx([12 / divisor, *[6 / divisor] * 3])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_every_kind_train_and_come_back(bias, tmp_path):
    model = adapted(gpt2(), target_modules=["wte", "c_attn"], bias=bias)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
    train(model, LANGUAGE, 10)
    changed = {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert changed == {n for n in before if bias == "all" or "c_attn" in n}
    loaded = reloaded(model, gpt2(), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_modules_to_save_beside_adapted_embeddings_train_and_come_back(tmp_path):
    model = adapted(gpt2(), target_modules=["wpe", "c_attn"], modules_to_save=["ln_f"])
    before = model.base_model.model.transformer.ln_f.modules_to_save["default"].weight.detach().clone()
    scheduler, _ = train(model, LANGUAGE)
    assert scheduler.total_rank == scheduler.budget
    assert not torch.equal(model.base_model.model.transformer.ln_f.modules_to_save["default"].weight, before)
    loaded = reloaded(model, gpt2(), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_embeddings_and_linear_layers_of_bert_grow_together(make_bert, tmp_path):
    targets = ["word_embeddings", "position_embeddings", "query", "value"]
    model = adapted(make_bert(), target_modules=targets, task_type="SEQ_CLS")
    kinds = [type(layer) for layer in layers_of(model).values()]
    assert kinds == [Embedding, Embedding, *[Linear] * 4]
    scheduler, losses = train(model, {"input_ids": IDS, "labels": torch.tensor([0, 2])})
    assert scheduler.total_rank == scheduler.budget == 18
    assert min(scheduler.scores.values()) > 0.0
    assert losses[-1] < losses[0]
    loaded = reloaded(model, make_bert(), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_the_patches_of_vit_grow_beside_its_attention(tmp_path):
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = adapted(vit(), target_modules=r".*(projection|q_proj|query)", modules_to_save=["classifier"])
    assert [type(layer) for layer in layers_of(model).values()] == [Convolution, Linear]
    inputs = {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 0])}
    scheduler, losses = train(model, inputs)
    assert scheduler.total_rank == scheduler.budget == 6
    assert losses[-1] < 0.5 * losses[0]
    loaded = reloaded(model, vit(), tmp_path)
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(pixels).logits, loaded(pixels).logits, rtol=1e-4, atol=1e-5)


def test_t5_grows_to_its_budget(tmp_path):
    model = adapted(t5(), target_modules=["q", "v", "wi", "lm_head"])
    scheduler, losses = train(model, LANGUAGE)
    assert scheduler.total_rank == scheduler.budget
    assert losses[-1] < losses[0]
    loaded = reloaded(model, t5(), tmp_path)
    assert torch.equal(loaded(input_ids=IDS, labels=IDS).logits, model(input_ids=IDS, labels=IDS).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_gpt2_changes_nothing(reentrant):
    results = []
    for checkpointing in (False, True):
        model = adapted(gpt2(), target_modules=["wte", "c_attn"], lora_dropout=0.2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(4)
        scheduler, losses = train(model, LANGUAGE, 20)
        results.append((scheduler.ranks, losses))
    assert results[0] == results[1]


# Weights that two modules share.


def test_an_adapter_on_a_tied_embedding_leaves_the_head_alone():
    base = gpt2()
    assert base.lm_head.weight is base.transformer.wte.weight
    model = adapted(gpt2(), target_modules=["wte"])
    train(model, LANGUAGE, 10)
    inner = model.base_model.model
    assert torch.equal(inner.lm_head.weight, base.lm_head.weight)
    assert not torch.equal(inner.transformer.wte(IDS), base.transformer.wte(IDS))


def test_merging_into_a_tied_embedding_gives_it_a_weight_of_its_own():
    model = adapted(gpt2(), target_modules=["wte", "c_attn"])
    train(model, LANGUAGE, 10)
    wanted = model(IDS).logits.detach()
    with pytest.warns(UserWarning, match=r"transformer\.wte.*own"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert merged.lm_head.weight is not merged.transformer.wte.weight
    assert merged.config.tie_word_embeddings is False


def test_merging_a_tied_embedding_and_unmerging_it_gives_the_outputs_back():
    model = adapted(gpt2(), target_modules=["wte"])
    before = model(IDS).logits.detach()
    train(model, LANGUAGE, 10)
    wanted = model(IDS).logits.detach()
    with pytest.warns(UserWarning, match=r"transformer\.wte.*own"):
        model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-4)


def test_merging_other_modules_of_a_tied_model_keeps_it_tied():
    model = adapted(gpt2(), target_modules=["c_attn"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight


# Single tokens.


@pytest.mark.parametrize("tied", [True, False])
def test_trainable_tokens_train_and_come_back(tied, tmp_path):
    kwargs = {"tie_word_embeddings": tied}
    model = adapted(gpt2(**kwargs), target_modules=["c_attn"], trainable_token_indices={"wte": [3, 5]})
    rows = gpt2(**kwargs).transformer.wte.weight.detach()
    inputs = {"input_ids": torch.tensor([[3, 5, 7, 3]]), "labels": torch.tensor([[3, 5, 7, 3]])}
    scheduler, _ = train(model, inputs)
    assert scheduler.total_rank == scheduler.budget == 9
    changed = model.base_model.model.transformer.wte(torch.arange(99)).detach() != rows
    assert changed.any(1).nonzero().flatten().tolist() == [3, 5]
    loaded = reloaded(model, gpt2(**kwargs), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, loaded(IDS).logits, rtol=1e-4, atol=1e-4)


def test_trainable_tokens_of_a_full_embedding_are_refused():
    with pytest.raises(ValueError, match="not both"):
        adapted(gpt2(), trainable_token_indices={"wte": [3]}, modules_to_save=["wte"])
