"""LoRTA: the five tensors of a model against its tensor of five ways built whole, in float64."""

import copy
import json
import math
import sys

import peft
import pytest
import torch
from increlora_rs import LortaConfig, attach, export_lora, module_table
from increlora_rs.layers.found import adapted_layers
from increlora_rs.methods import lorta
from increlora_rs.ops.update import Call
from increlora_rs.support.names import short
from largest import Largest
from launches import WORKERS, torchrun
from method_cases import assert_equal_bits
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

sys.path.insert(0, str(WORKERS))

import shared_parameters

QKVO = ["query", "key", "value", "attention.output.dense"]
WIDTH, HEADS, LAYERS, RANK = 24, 4, 3, 2
NAMES = ("lora_A", "lora_B", "lora_C_h", "lora_C_l", "lora_C_m")
ORIENTATIONS = ("natural", "litgpt", "peft")
IDS = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def make_bert(width=WIDTH, layers=LAYERS, heads=HEADS):
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=20,
        max_position_embeddings=16,
        num_labels=3,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).double().eval()


def adapted(base, **settings):
    torch.manual_seed(3)
    settings = {"r": RANK, "lora_alpha": 3, "target_modules": QKVO, "init_lora_weights": False} | settings
    return get_peft_model(base, LortaConfig(**settings)).double()


def layers_of(model, adapter="default"):
    return {short(name): layer for name, layer in adapted_layers(model, adapter).items()}


def five(model, adapter="default"):
    """The tensors of the model, as its first module has them."""
    layer = next(iter(layers_of(model, adapter).values()))
    return dict(zip(NAMES, layer.factors(adapter), strict=True))


def block(tensors, head, layer, kind):
    """G = A diag(C_h[h] * C_m[m] * C_l[l]) B, (d, d / H): A is (d, r) here, and B (r, d / H)."""
    c = tensors["lora_C_h"][:, head] * tensors["lora_C_m"][:, kind] * tensors["lora_C_l"][:, layer]
    return tensors["lora_A"].t() @ torch.diag(c) @ tensors["lora_B"]


def literal(tensors, layer, kind, *, heads_go_in, scale):
    """The update (out, in) of a module, of the blocks of its heads side by side."""
    heads = tensors["lora_C_h"].shape[1]
    d = torch.cat([block(tensors, head, layer, kind) for head in range(heads)], 1)
    return scale * (d if heads_go_in else d.t())


def kinds_of_bert(name):
    layer = int(name.split("layer.")[1].partition(".")[0])
    return layer, next(k for k, kind in enumerate(QKVO) if name.endswith(kind))


def wanted_of(model, orientation, scale=3 / RANK):
    """The dense updates of an adapted BERT by module name."""
    tensors, updates = five(model), {}
    for name in layers_of(model):
        layer, kind = kinds_of_bert(name)
        heads_go_in = kind == 3 if orientation == "natural" else orientation == "peft"
        updates[name] = literal(tensors, layer, kind, heads_go_in=heads_go_in, scale=scale)
    return updates


def dense_of(model):
    return {name: layer.get_delta_weight("default") for name, layer in layers_of(model).items()}


# The tensors.


def test_roberta_base_trains_860_numbers_a_rank_and_the_large_one_1132():
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    for config, of_rank in ((RobertaConfig(), 860), (RobertaConfig(**large), 1132)):
        for r in (1, 4, 8):
            with torch.device("meta"):
                model = get_peft_model(RobertaModel(config), LortaConfig(r=r, target_modules=QKVO))
            assert model.get_nb_trainable_parameters()[0] == of_rank * r


def test_the_numbers_are_those_of_the_formula_and_of_what_is_adapted():
    r, d, h = 5, WIDTH, HEADS
    for targets, layers, indices in ((QKVO, 3, None), (["query"], 3, None), (["query", "value"], 2, [0, 2])):
        model = adapted(make_bert(), r=r, target_modules=targets, layers_to_transform=indices)
        assert model.get_nb_trainable_parameters()[0] == r * (d + d // h + h + layers + len(targets))


def test_all_modules_hold_the_same_five_parameters():
    model = adapted(make_bert())
    layers = layers_of(model)
    assert len(layers) == 4 * LAYERS
    for layer in layers.values():
        assert [id(p) for p in layer.factors("default")] == [id(p) for p in five(model).values()]
    assert len([p for p in model.parameters() if p.requires_grad]) == 5
    shapes = {name: tuple(p.shape) for name, p in five(model).items()}
    columns = (WIDTH, WIDTH // HEADS, HEADS, LAYERS, 4)
    assert shapes == {name: (RANK, count) for name, count in zip(NAMES, columns, strict=True)}


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_the_start_is_uniform_over_the_rank(scale):
    model = adapted(make_bert(width=512), r=5, init_scale=scale, init_lora_weights=True)
    tensors = five(model)
    assert not tensors["lora_B"].any()
    bounds = {"lora_A": 1 / math.sqrt(5)}
    bounds |= dict.fromkeys(NAMES[2:], math.sqrt(6 / ((1 + 5 * scale**2) * 5)))
    for name, bound in bounds.items():
        largest = float(tensors[name].detach().abs().max())
        assert largest < bound, name
        assert largest > 0.6 * bound, name
    assert float(tensors["lora_A"].detach().std()) == pytest.approx(bounds["lora_A"] / math.sqrt(3), rel=0.05)


def test_a_fresh_update_is_0_in_every_orientation():
    for orientation in ORIENTATIONS:
        model = adapted(make_bert(), orientation=orientation, init_lora_weights=True)
        assert not any(update.any() for update in dense_of(model).values())


# The update.


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_updates_are_slices_of_the_tensor_of_five_ways(orientation):
    model = adapted(make_bert(), orientation=orientation)
    for name, update in dense_of(model).items():
        torch.testing.assert_close(update, wanted_of(model, orientation)[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_outputs_and_gradients_are_those_of_the_dense_updates(orientation):
    model, base = adapted(make_bert(), orientation=orientation), make_bert()
    inputs = {"input_ids": IDS, "labels": torch.tensor([0, 2])}
    loss = model(**inputs).loss
    weights = {
        f"{name}.weight": base.get_submodule(name).weight + update
        for name, update in wanted_of(model, orientation).items()
    }
    wanted = functional_call(base, weights, args=(), kwargs=inputs).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-11, atol=0.0)
    parameters = list(five(model).values())
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters), rtol=1e-9, atol=1e-13
    )


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_update_has_at_most_rank_r_and_on_one_side_all_together(orientation):
    updates = list(dense_of(adapted(make_bert(), orientation=orientation)).values())
    assert all(int(torch.linalg.matrix_rank(update)) == RANK for update in updates)
    # Of all modules that take heads in the same side, also the other side is the same.
    together = int(torch.linalg.matrix_rank(torch.cat(updates, 1)))
    assert together == (2 * RANK if orientation == "natural" else RANK)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_kind_a_layer_and_a_head_are_silenced_by_their_columns(orientation):
    def silenced(table, column):
        model = adapted(make_bert(), orientation=orientation)
        with torch.no_grad():
            five(model)[table][:, column] = 0.0
        return dense_of(model)

    for name, update in silenced("lora_C_m", 1).items():
        assert bool(update.any()) is not name.endswith("key")
    for name, update in silenced("lora_C_l", 2).items():
        assert bool(update.any()) is ("layer.2." not in name)
    size = WIDTH // HEADS
    for name, update in silenced("lora_C_h", 1).items():
        goes_in = name.endswith("output.dense") if orientation == "natural" else orientation == "peft"
        heads = (update if goes_in else update.t()).split(size, 1)
        assert [bool(head.any()) for head in heads] == [True, False, True, True]


def test_the_factors_have_a_scale_that_cancels():
    model = adapted(make_bert())
    before, t = dense_of(model), torch.tensor([[3.0], [0.25]], dtype=torch.float64)
    with torch.no_grad():
        five(model)["lora_A"].mul_(t)
        five(model)["lora_C_l"].div_(t)
    for name, update in dense_of(model).items():
        torch.testing.assert_close(update, before[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_no_pass_forms_a_dense_update(orientation):
    model = adapted(make_bert(), orientation=orientation).train()
    for name, layer in layers_of(model).items():
        x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
        y = torch.zeros(3, WIDTH, dtype=torch.float64)
        with Largest() as seen:
            update = layer.structure.update(
                layer.tensors("default"), layer.site, layer.configs["default"], 1.0, training=True
            )
            update.add(y, x, Call()).sum().backward()
            a, b = update.lora()
        assert a.shape == (RANK, WIDTH) and b.shape == (WIDTH, RANK), name
        assert 3 * WIDTH <= seen.numbers < WIDTH * WIDTH, name


# Saving.


def test_the_file_has_the_tensors_once_under_the_first_module(tmp_path):
    model = adapted(make_bert()).float()
    model.save_pretrained(tmp_path)
    first = "base_model.model.bert.encoder.layer.0.attention.self.query"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == {f"{first}.{name}.weight" for name in NAMES}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["module_names"] == list(layers_of(model))
    assert config["heads"] == HEADS


@pytest.mark.parametrize("assign", [False, True], ids=["", "low_cpu_mem_usage"])
def test_a_loaded_adapter_shares_its_tensors_again(tmp_path, assign):
    model = adapted(make_bert()).float()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        make_bert().float(), tmp_path, is_trainable=True, low_cpu_mem_usage=assign
    )
    assert len([p for p in loaded.parameters() if p.requires_grad]) == 5
    for layer in layers_of(loaded).values():
        assert [id(p) for p in layer.factors("default")] == [id(p) for p in five(loaded).values()]
    for name, tensor in five(model).items():
        assert torch.equal(five(loaded)[name], tensor)


def test_copies_and_moves_of_a_model_keep_one_set():
    model = adapted(make_bert())
    for twin in (
        copy.deepcopy(model),
        copy.deepcopy(model).float(),
        copy.deepcopy(model).to_empty(device="meta"),
    ):
        assert len([p for p in twin.parameters() if p.requires_grad]) == 5
        assert five(twin)["lora_A"] is not five(model)["lora_A"]
        for layer in layers_of(twin).values():
            assert layer.factors("default")[0] is five(twin)["lora_A"]


def test_two_adapters_have_a_set_each():
    model = adapted(make_bert())
    model.add_adapter("second", LortaConfig(r=3, target_modules=["query"], init_lora_weights=False))
    assert len(layers_of(model, "second")) == LAYERS
    assert five(model, "second")["lora_A"].shape == (3, WIDTH)
    assert five(model)["lora_A"].shape == (RANK, WIDTH)
    model.delete_adapter("second")
    assert not [name for name, _ in model.named_parameters() if "second" in name]


def test_keys_of_a_state_dict_do_not_narrow_the_modules():
    model = adapted(make_bert()).float()
    saved = peft.get_peft_model_state_dict(model)
    config = copy.copy(model.peft_config["default"])
    injected = peft.inject_adapter_in_model(config, make_bert().float(), state_dict=saved)
    peft.set_peft_model_state_dict(injected, saved)
    assert len(adapted_layers(injected, "default")) == 4 * LAYERS
    torch.testing.assert_close(injected(IDS).logits, model(IDS).logits, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_export_is_the_dense_update_of_every_module(orientation, tmp_path):
    model = adapted(make_bert(), orientation=orientation)
    updates = wanted_of(model, orientation)
    model.save_pretrained(tmp_path / "saved")
    export_lora(tmp_path / "saved", tmp_path / "lora")
    lora = PeftModel.from_pretrained(make_bert(), tmp_path / "lora", autocast_adapter_dtype=False)
    layers = {n: m for n, m in lora.get_base_model().named_modules() if hasattr(m, "lora_A") and n in updates}
    assert layers.keys() == updates.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.get_delta_weight("default"), updates[name], rtol=1e-10, atol=1e-12)
        assert layer.r["default"] == RANK


def test_the_table_of_a_saved_adapter_has_every_module(tmp_path):
    model = adapted(make_bert()).float()
    model.save_pretrained(tmp_path)
    rows = module_table(tmp_path).rows
    assert sorted(row.name for row in rows) == sorted(layers_of(model))
    assert {row.shape for row in rows} == {(WIDTH, WIDTH)}


@pytest.mark.parametrize(
    "change",
    [{"module_names": []}, {"heads": None}],
    ids=["no names", "no heads"],
)
def test_a_configuration_without_what_the_library_keeps_is_refused(tmp_path, change):
    adapted(make_bert()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"model_or_adapter_dir: .* share one set, with heads="):
        module_table(tmp_path)


# Training.


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", ""])
def test_checkpointing_gives_the_gradients_of_the_shared_tensors(reentrant):
    gradients = []
    for checkpoints in (False, True):
        model = adapted(make_bert(), lora_dropout=0.2).train()
        if checkpoints:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(4)
        model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
        gradients.append([p.grad for p in five(model).values()])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-15)


def test_an_optimizer_moves_each_tensor_once_a_step():
    model = adapted(make_bert()).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    attach(model, optimizer, total_steps=3)
    before = {name: p.detach().clone() for name, p in five(model).items()}
    model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    gradients = {name: p.grad.clone() for name, p in five(model).items()}
    optimizer.step()
    for name, p in five(model).items():
        torch.testing.assert_close(p.detach(), before[name] - 0.5 * gradients[name], rtol=1e-12, atol=1e-15)


def chain(model, x, *, nested=False, fails=False):
    """Four adapted layers, the first two and the last two in a reentrant checkpoint each."""

    def one(k, x):
        return torch.tanh(model.get_base_model()[k](x))

    def checkpointed(function, x):
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=True)

    def pair(k, x):
        x = checkpointed(lambda x: one(k, x), x) if nested else one(k, x)
        if fails and torch.is_grad_enabled() and k == 0:
            raise ArithmeticError("broken off")
        return one(k + 1, x)

    x = checkpointed(lambda x: pair(0, x), x)
    return checkpointed(lambda x: pair(2, x), x).square().sum()


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
def test_a_shared_tensor_gets_its_gradient_once_whatever_the_checkpoints(nested):
    torch.manual_seed(5)
    base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).double()
    model = adapted(base, target_modules=["0", "1", "2", "3"], heads=2).train()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    parameters, times = list(five(model).values()), []
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda p: times.append(p))
    plain = x
    for layer in model.get_base_model():
        plain = torch.tanh(layer(plain))
    wanted = torch.autograd.grad(plain.square().sum(), parameters)
    with pytest.raises(ArithmeticError, match="broken off"):
        chain(model, x, fails=True).backward()
    assert not times
    chain(model, x, nested=nested).backward()
    assert len(times) == 5
    torch.testing.assert_close([p.grad for p in parameters], list(wanted), rtol=1e-12, atol=1e-15)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes got, of one launch for all scenarios."""
    out = tmp_path_factory.mktemp("shared_parameters")
    return torchrun(2, "shared_parameters.py", out)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", shared_parameters.SCENARIOS)
def test_two_processes_have_one_gradient_of_the_shared_tensors(processes, scenario):
    first, second = (result[scenario] for result in processes)
    alone = shared_parameters.alone(2)
    for one, other, wanted in zip(
        [*first["gradients"], first["parameters"]],
        [*second["gradients"], second["parameters"]],
        [*alone["gradients"], alone["parameters"]],
        strict=True,
    ):
        assert_equal_bits(other, one)
        assert len(one) == 5
        torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-13)


# Architectures.


def outputs(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=16))


def t5():
    config = T5Config(vocab_size=50, d_model=WIDTH, d_kv=6, d_ff=20, num_layers=2, num_heads=HEADS)
    return T5Model(config)


def bart():
    sides = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("ffn_dim", 20), ("attention_heads", HEADS))
    }
    return BartModel(BartConfig(vocab_size=50, d_model=WIDTH, max_position_embeddings=16, **sides))


def qwen3():
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    return Qwen3ForCausalLM(config)


def phi():
    config = PhiConfig(
        vocab_size=50,
        # Half of each head turns.
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    return PhiForCausalLM(config)


# Targets, inputs, layers and kinds of matrices.
ARCHITECTURES = {
    "GPT-2's output": (gpt2, r".*attn\.c_proj", {"input_ids": IDS}, 2, 1),
    "T5": (t5, ["q", "k", "v", "o"], {"input_ids": IDS, "decoder_input_ids": IDS}, 2, 4 + 8),
    "BART": (bart, ["q_proj", "v_proj", "out_proj"], {"input_ids": IDS}, 2, 3 + 6),
    "Qwen3, wide heads": (qwen3, ["q_proj", "o_proj"], {"input_ids": IDS}, 2, 2),
    "Phi": (phi, ["q_proj", "k_proj", "v_proj", "dense"], {"input_ids": IDS}, 2, 4),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_give_the_outputs_of_the_merged_model(architecture, tmp_path):
    make, targets, inputs, layers, kinds = ARCHITECTURES[architecture]

    def build():
        torch.manual_seed(7)
        return make().double().eval()

    model = adapted(build(), target_modules=targets)
    tensors = five(model)
    assert (tensors["lora_C_l"].shape[1], tensors["lora_C_m"].shape[1]) == (layers, kinds)
    places = {name: layer.configs["default"].place(name) for name, layer in layers_of(model).items()}
    assert len(set(places.values())) == len(places)
    base, changed = build(), 0
    for name, place in places.items():
        last = name.rpartition(".")[2]
        goes_in = last in ("o", "out_proj", "o_proj", "c_proj", "dense")
        assert place.heads_go_in is goes_in
        update = literal(tensors, place.layer, place.kind, heads_go_in=goes_in, scale=3 / RANK)
        weight = base.get_submodule(name).weight
        weight.data += update.t() if last == "c_proj" else update
        changed += 1
    assert changed == len(places) >= 2
    torch.testing.assert_close(outputs(model, inputs), outputs(base, inputs), rtol=1e-9, atol=1e-11)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(outputs(loaded, inputs), outputs(model, inputs), rtol=1e-9, atol=1e-11)


HEADS_GO_IN = {
    "bert.encoder.layer.0.attention.output.dense": True,
    "bert.encoder.layer.0.crossattention.output.dense": True,
    "bert.encoder.layer.0.output.dense": False,
    "bert.encoder.layer.0.attention.self.query": False,
    "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense": True,
    "transformer.h.0.attn.c_proj": True,
    "transformer.h.0.crossattention.c_proj": True,
    "transformer.h.0.attn.c_attn": False,
    "transformer.h.0.mlp.c_proj": False,
    "transformer.h.0.self_attention.dense": True,
    "model.layers.0.self_attn.dense": True,
    "model.layers.0.self_attn.o_proj": True,
    "model.layers.0.self_attn.v_proj": False,
    "model.layers.0.attn.Wo": True,
    "model.layers.0.attn.Wqkv": False,
    "model.layers.0.mlp.Wo": False,
    "visual.blocks.0.attn.proj": True,
    "attention_tower.blocks.0.mlp.proj": False,
    "decoder.block.0.layer.1.EncDecAttention.o": True,
    "down_blocks.0.transformer_blocks.0.attn1.to_out.0": True,
    "proj": False,
}


@pytest.mark.parametrize("name", HEADS_GO_IN)
def test_an_attentions_output_is_known_by_its_name(name):
    assert LortaConfig().heads_go_in(name) is HEADS_GO_IN[name]


def test_a_saved_adapter_names_what_takes_heads_in(tmp_path, monkeypatch):
    for orientation, named in (("natural", ["attention.output.dense"]), ("peft", None)):
        model = adapted(make_bert(), orientation=orientation)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["after_heads"] == named
    adapted(make_bert()).save_pretrained(tmp_path)
    # As a release that knows other names.
    monkeypatch.setattr(lorta, "_AFTER_HEADS", ("query",))
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path, autocast_adapter_dtype=False)
    for name, update in wanted_of(loaded, "natural").items():
        torch.testing.assert_close(dense_of(loaded)[name], update, rtol=1e-12, atol=1e-12)


def test_a_base_that_has_its_modules_in_another_order_takes_the_adapter(tmp_path):
    def base(names):
        torch.manual_seed(5)
        return nn.ModuleDict({name: nn.Linear(8, 8).double() for name in names})

    model = adapted(base(["v", "q", "o"]), target_modules=["q", "v", "o"], heads=2)
    for folder in ("first", "again"):
        model.save_pretrained(tmp_path / folder)
        loaded = PeftModel.from_pretrained(
            base(["q", "o", "v"]), tmp_path / folder, autocast_adapter_dtype=False
        )
        for name, update in dense_of(model).items():
            assert torch.equal(dense_of(loaded)[name], update)
        model = loaded


# What is refused.


def test_projections_that_are_not_square_are_refused_in_the_orientations_that_do_not_allow_them():
    for orientation in ("litgpt", "peft"):
        with pytest.raises(
            ValueError,
            match=rf"target_modules: .*o_proj: orientation='{orientation}': lora_A.*\(2, \d+\).*"
            "leave it out of target_modules, or take another orientation",
        ):
            adapted(qwen3(), target_modules=["q_proj", "o_proj"], orientation=orientation)


@pytest.mark.parametrize(
    ("make", "targets", "told"),
    [
        # Fewer heads of keys than of queries.
        (qwen3, ["q_proj", "k_proj"], r"k_proj: orientation='natural': lora_B.*\(2, 8\).*\(2, 4\)"),
        (make_bert, ["query", "intermediate.dense"], r"intermediate\.dense: orientation='natural': lora_B"),
        (make_bert, ["query", "output.dense"], r"layer\.0\.output\.dense: orientation='natural': lora_A"),
        (lambda: make_bert(width=20), [*QKVO, "classifier"], r"classifier: .*its output of 3.*heads=4"),
        (make_bert, ["query", "word_embeddings"], r"word_embeddings: it is of kind 'embedding', and LoRTA"),
    ],
    ids=["grouped keys", "wide", "narrow", "no heads", "embedding"],
)
def test_a_module_that_does_not_fit_is_refused_by_name_and_orientation(make, targets, told):
    with pytest.raises(ValueError, match=rf"target_modules: .*{told}.*leave it out of target_modules"):
        adapted(make(), target_modules=targets)


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"query: orientation='natural': its output of 24 is not.*heads=5"):
        adapted(make_bert(), heads=5)


def test_a_model_that_does_not_tell_its_heads_needs_the_number():
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"heads=None: .*num_attention_heads=None.*LortaConfig\(heads="):
        adapted(base, target_modules=["0", "1"])
    assert five(adapted(base, target_modules=["0", "1"], heads=2))["lora_C_h"].shape == (RANK, 2)


def test_modules_whose_input_is_in_heads_can_be_named():
    base = nn.ModuleDict({"into": nn.Linear(8, 8), "from": nn.Linear(8, 8)})
    model = adapted(base, target_modules=["into", "from"], heads=2, after_heads=["from"])
    config = model.peft_config["default"]
    assert {name: config.place(name).heads_go_in for name in layers_of(model)} == {
        "into": False,
        "from": True,
    }


def test_an_adapter_of_other_modules_is_refused_with_the_first_that_differs(tmp_path):
    adapted(make_bert()).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"module_names: .*over 12 modules.* 8 are adapted.*'bert.*layer\.2\."
    ):
        PeftModel.from_pretrained(make_bert(layers=2), tmp_path)


def test_a_configuration_serves_several_models():
    config = LortaConfig(r=2, target_modules=QKVO)
    for layers in (1, 3):
        model = get_peft_model(make_bert(layers=layers), config)
        assert five(model)["lora_C_l"].shape == (2, layers)
    assert config.module_names == []
    assert config.heads is config.after_heads is None
