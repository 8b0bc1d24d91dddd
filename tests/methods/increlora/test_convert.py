"""A trained plain LoRA becomes an IncreLoRA adapter of the same function, and grows from there."""

import json
import warnings

import pytest
import torch
from growing import growing
from increlora_rs import attach, convert_lora, export_lora
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUERY = "bert.encoder.layer.0.attention.self.query"
SETTINGS = {
    "as it is": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"layer.1.attention.self.query": 5, "value": 2}},
    "alpha_pattern": {"alpha_pattern": {"layer.1.attention.self.query": 24, "value": 3}},
    "all": {"use_rslora": True, "rank_pattern": {"value": 6}, "alpha_pattern": {"value": 24}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "modules_to_save": {"modules_to_save": ["classifier"]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "regex": {"target_modules": r".*\.self\.(query|value)"},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layer"},
    "exclude": {"target_modules": ["query", "value", "key"], "exclude_modules": ["key"]},
    "task": {"task_type": "SEQ_CLS"},
    "trainable tokens": {"trainable_token_indices": {"word_embeddings": [1, 5]}},
    "dropout": {"lora_dropout": 0.3},
}
sources = pytest.mark.parametrize("source", ["model", "directory"])


@pytest.fixture
def train(make_bert):
    """``train(**arguments)``: a BERT with a plain LoRA that is not at its start."""

    def run(dtype=torch.float32, **arguments):
        config = LoraConfig(**({"target_modules": ["query", "value"], "r": 4, "lora_alpha": 6} | arguments))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(make_bert().to(dtype), config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.empty_like(parameter).normal_(0.0, 0.2, generator=generator)
        return model.eval()

    return run


def converted(model, source, tmp_path, *args, **kwargs):
    """Converts from the model or from its saved directory; the directory written."""
    if source == "directory":
        model.save_pretrained(tmp_path / "lora")
        model = tmp_path / "lora"
    convert_lora(model, tmp_path / "adapter", *args, **kwargs)
    return tmp_path / "adapter"


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def ranks_of(model):
    return {short(n): layer.r["default"] for n, layer in adapted_layers(model, "default").items()}


# The same function.


@sources
@pytest.mark.parametrize(
    "form", [{}, {"scaling": "rank", "init_lora_weights": "svd"}], ids=["default", "paper"]
)
@pytest.mark.parametrize("arguments", SETTINGS.values(), ids=SETTINGS)
def test_converted_lora_gives_the_same_outputs(train, make_bert, tokens, tmp_path, source, form, arguments):
    model = train(**arguments)
    path = converted(model, source, tmp_path, **form)
    loaded = PeftModel.from_pretrained(make_bert(), path).eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0.0, atol=1e-5)
    assert (logits(loaded, tokens) - logits(make_bert(), tokens)).abs().max() > 0.1


def test_converted_float64_lora_is_exact(train, make_bert, tokens, tmp_path):
    model = train(torch.float64, use_rslora=True)
    path = converted(model, "model", tmp_path)
    loaded = PeftModel.from_pretrained(make_bert().double(), path).eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0.0, atol=1e-10)


def test_converted_lora_gives_the_same_outputs_in_a_new_process(
    train, new_process, bert_dir, tokens, tmp_path
):
    model = train()
    answer = new_process(bert_dir, converted(model, "directory", tmp_path), tokens)
    found = torch.tensor(answer["logits"], dtype=torch.float32)
    torch.testing.assert_close(found, logits(model, tokens), rtol=0.0, atol=1e-5)


def test_bfloat16_lora_becomes_float32_factors(train, tmp_path):
    model = train(r=3)
    model.save_pretrained(tmp_path / "lora")
    tensors = {k: t.bfloat16() for k, t in load_file(tmp_path / "lora" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "lora" / WEIGHTS, metadata={"format": "pt"})
    convert_lora(tmp_path / "lora", tmp_path / "adapter")
    ours = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    name = f"base_model.model.{QUERY}"
    a, b = (tensors[f"{name}.lora_{factor}.weight"].double() for factor in "AB")
    found = (
        ours[f"{name}.lora_B.weight"].double()
        * ours[f"{name}.lora_E.weight"].view(-1).double()
        @ ours[f"{name}.lora_A.weight"].double()
    )
    torch.testing.assert_close(found, b @ a, rtol=0.0, atol=1e-5)


def test_lora_saved_without_safetensors_is_converted(train, make_bert, tokens, tmp_path):
    model = train()
    model.save_pretrained(tmp_path / "lora", safe_serialization=False)
    convert_lora(tmp_path / "lora", tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0.0, atol=1e-5)


def test_exported_adapter_comes_back_with_its_ranks(make_bert, grow, tokens, tmp_path):
    model = get_peft_model(make_bert(), growing(r=3, target_modules=["query", "value"]))
    ranks = grow(model)
    export_lora(model, tmp_path / "lora", rank=16)
    config = convert_lora(tmp_path / "lora", tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "adapter").eval()
    assert ranks_of(loaded) == ranks
    assert config.r == 2
    torch.testing.assert_close(logits(loaded, tokens), logits(model.eval(), tokens), rtol=0.0, atol=1e-5)


# What is written.


@sources
def test_factors_are_orthonormal_and_e_falls(train, tmp_path, source):
    tensors = load_file(converted(train(), source, tmp_path) / WEIGHTS)
    names = [key.removesuffix(".lora_E.weight") for key in tensors if key.endswith(".lora_E.weight")]
    assert len(names) == 4
    for name in names:
        a, b, e = (tensors[f"{name}.lora_{factor}.weight"].double() for factor in "ABE")
        torch.testing.assert_close(a @ a.T, torch.eye(4, dtype=torch.float64), rtol=0.0, atol=1e-6)
        torch.testing.assert_close(b.T @ b, torch.eye(4, dtype=torch.float64), rtol=0.0, atol=1e-6)
        assert (e.view(-1).diff() <= 0).all()
        assert e.min() > 0


def test_configuration_keeps_the_scale_and_what_concerns_the_base(train, tmp_path):
    model = train(r=4, lora_alpha=6, lora_dropout=0.3, task_type="SEQ_CLS", revision="v2")
    config = convert_lora(model, tmp_path / "adapter", 10)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (10, 15.0, 0.3)
    assert (config.task_type, config.revision) == ("SEQ_CLS", "v2")
    assert sorted(config.modules_to_save) == ["classifier", "score"]
    stored = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (stored["peft_type"], stored["r"], sorted(stored["target_modules"])) == (
        "INCRELORA",
        10,
        ["query", "value"],
    )


def test_alpha_and_schedule_may_be_given(train, make_bert, tokens, tmp_path):
    model = train()
    config = convert_lora(model, tmp_path / "adapter", 8, lora_alpha=32, max_r=12, alpha_pattern={"value": 5})
    assert (config.lora_alpha, config.max_r) == (32, 12)
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "adapter").eval()
    assert {layer.scaling["default"] for layer in adapted_layers(loaded, "default").values()} == {4.0, 5 / 8}
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0.0, atol=1e-5)


def test_an_untrained_lora_keeps_one_component(make_bert, tokens, tmp_path):
    model = get_peft_model(make_bert(), LoraConfig(r=4, target_modules=["query"]))
    assert convert_lora(model, tmp_path / "adapter").r == 1
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "adapter").eval()
    assert set(ranks_of(loaded).values()) == {1}
    torch.testing.assert_close(logits(loaded, tokens), logits(make_bert(), tokens), rtol=0.0, atol=1e-6)


def test_rank_above_the_modules_size_becomes_the_modules_own(train, make_bert, tokens, tmp_path):
    model = train(r=40)
    loaded = PeftModel.from_pretrained(make_bert(), converted(model, "model", tmp_path)).eval()
    assert set(ranks_of(loaded).values()) == {32}
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0.0, atol=2e-5)


# Going on from there.


def test_converted_lora_grows_and_learns(train, make_bert, tokens, tmp_path):
    path = converted(train(r=2), "directory", tmp_path, 4)
    model = PeftModel.from_pretrained(make_bert(), path, is_trainable=True)
    assert set(ranks_of(model).values()) == {2}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = attach(model, optimizer, total_steps=40)
    labels, losses = torch.tensor([0, 2]), []
    for _ in range(40):
        loss = model(tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert scheduler.spent == scheduler.budget
    assert scheduler.total_rank == 16
    assert losses[-1] < 0.5 * losses[0]
    model.save_pretrained(tmp_path / "grown")
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "grown").eval()
    assert torch.equal(logits(loaded, tokens), logits(model.eval(), tokens))


def test_the_budget_of_a_converted_lora_holds_its_ranks_in_either_unit(train, make_bert, tmp_path):
    # Two modules of rank 1 that cost 65 and one of rank 6 that costs 132: on average 8 / 3, or 922 / 262.
    lora = train(target_modules=["query", "word_embeddings"], rank_pattern={"query": 1, "word_embeddings": 6})
    for unit, r in (("rank", 3), ("parameters", 4)):
        path = tmp_path / unit
        config = convert_lora(lora, path, budget_unit=unit)
        assert config.r == r
        model = PeftModel.from_pretrained(make_bert(), path, is_trainable=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        scheduler = attach(model, optimizer, total_steps=40)
        assert scheduler.spent <= scheduler.budget < scheduler.spent * r / (r - 1)


def test_converted_lora_lies_frozen_beside_a_growing_adapter(train, make_bert, tokens, tmp_path):
    lora = train()
    path = converted(lora, "directory", tmp_path)
    model = get_peft_model(make_bert(), growing(r=2, target_modules=["query"]))
    model.load_adapter(path, "style")
    model.base_model.set_adapter(["default", "style"])
    model.set_requires_grad("style", False)
    torch.testing.assert_close(logits(model.eval(), tokens), logits(lora, tokens), rtol=0.0, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = attach(model.train(), optimizer, total_steps=20)
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith(".style.weight")}
    for _ in range(20):
        model(tokens, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scheduler.total_rank == 4
    after = dict(model.named_parameters())
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
@sources
def test_lora_of_another_kind_is_refused_by_name(train, tmp_path, source, arguments, message):
    with pytest.raises(ValueError, match=message):
        converted(train(**arguments), source, tmp_path)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["key"]}, "target_modules=.*the LoRA says it"),
        ({"bias": "all"}, "bias='all'"),
        ({"rank_pattern": {"query": 3}}, "rank_pattern="),
        ({"lora_alpha": -1}, "lora_alpha=-1"),
        ({"r": 0}, "r=0"),
        ({"use_dora": True}, "use_dora=True"),
    ],
)
def test_wrong_option_is_refused_by_name(train, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert_lora(train(), tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists()


def test_unknown_option_is_refused(train, tmp_path):
    with pytest.raises(TypeError, match="rnak"):
        convert_lora(train(), tmp_path / "adapter", rnak=3)


def test_increlora_adapter_is_refused_by_its_type(make_bert, tmp_path):
    model = get_peft_model(make_bert(), growing(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match="no LoRA adapter 'default'"):
        convert_lora(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="type 'INCRELORA'; only 'LORA'"):
        convert_lora(tmp_path / "ours", tmp_path / "adapter")


def test_adalora_is_refused(make_bert, tmp_path):
    model = get_peft_model(make_bert(), AdaLoraConfig(total_step=9, target_modules=["query"]))
    with pytest.raises(ValueError, match="no LoRA adapter"):
        convert_lora(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, a, b: t[a].fill_(float("nan")), "lora_A of module 'bert"),
        (lambda t, a, b: t.pop(b), "query' has no lora_B"),
        (lambda t, a, b: t.update({a: t[a][:3].clone(), b: t[b][:, :3].clone()}), "has 3 rows, .* rank 4"),
        (lambda t, a, b: t.update({b: t[b][:, :3].clone()}), "lora_B of module"),
        (lambda t, a, b: t.update({f"{a[:-14]}.lora_C.weight": t[a].clone()}), "lora_C"),
        (lambda t, a, b: t.clear(), "no module with lora_A and lora_B"),
    ],
    ids=["not finite", "missing", "rank", "shape", "unknown", "empty"],
)
def test_damaged_lora_is_refused(train, tmp_path, change, message):
    train().save_pretrained(tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    change(tensors, *(f"base_model.model.{QUERY}.lora_{factor}.weight" for factor in "AB"))
    save_file(tensors, tmp_path / "lora" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        convert_lora(tmp_path / "lora", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("length", [0, 40, 300])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_truncated_lora_is_named_by_its_path(train, tmp_path, length, safe):
    train().save_pretrained(tmp_path, safe_serialization=safe)
    path = next(tmp_path.glob("adapter_model.*"))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError) as error:
        convert_lora(tmp_path, tmp_path / "adapter")
    assert str(path) in str(error.value)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_lora(tmp_path / "nowhere", tmp_path / "adapter")


def test_conversion_into_the_loras_own_directory_is_refused(train, tmp_path):
    train().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is the directory of the adapter itself"):
        convert_lora(tmp_path, tmp_path)


def test_lora_is_left_as_it_was(train, tmp_path):
    model = train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    convert_lora(model, tmp_path / "adapter")
    after = model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
