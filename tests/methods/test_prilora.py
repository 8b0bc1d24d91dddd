"""PRILoRA: ranks that rise with depth, and the pruning against the method written down, in float64."""

import json
import math

import pytest
import torch
from increlora_rs import PriLoraConfig, SoraConfig, attach, export_lora
from increlora_rs.layers.found import adapted_layers
from increlora_rs.methods.prilora import rising
from increlora_rs.support.sites import depths
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import BartConfig, BartModel

SHAPES = {"lin0": (20, 12), "lin1": (6, 20)}
LINEAR = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def configure(**kwargs):
    return PriLoraConfig(**({"target_modules": list(SHAPES), "r": 4, "lora_alpha": 8} | kwargs))


def adapted(make_plain, **kwargs):
    torch.manual_seed(3)
    return get_peft_model(make_plain(), configure(**kwargs)).double().train()


def optimizer_of(model, lr=2e-2, decay=0.1):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=decay)


def layers_of(model):
    return {name.rpartition(".")[2]: layer for name, layer in adapted_layers(model, "default").items()}


def factors_of(model):
    return {
        name: [p.detach().clone() for p in layer.factors("default")]
        for name, layer in layers_of(model).items()
    }


def batches(steps, rows=9, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield (
            torch.randn(rows, 12, generator=generator, dtype=torch.float64),
            torch.randn(rows, 6, generator=generator, dtype=torch.float64),
        )


def train(model, optimizer, steps, **kwargs):
    for x, y in batches(steps, **kwargs):
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def prune(a, norms, share, by_row):
    """The floor(share n) smallest |A| v of each row, or of all, become 0."""
    scores = a.abs() * norms
    groups = scores if by_row else scores.reshape(1, -1)
    count = math.floor(share * groups.shape[1] + 1e-9)
    order = groups.argsort(dim=1, stable=True)[:, :count]
    keep = torch.ones_like(groups).scatter_(1, order, 0.0).reshape(a.shape)
    return a * keep


# The ranks.


def ranks_of(model):
    return {name: layer.r["default"] for name, layer in adapted_layers(model, "default").items()}


def test_ranks_rise_from_4_to_12_and_train_what_rank_8_everywhere_does(make_bert):
    model = get_peft_model(make_bert(layers=12), PriLoraConfig(r=8, target_modules=LINEAR))
    lora = get_peft_model(make_bert(layers=12), LoraConfig(r=8, target_modules=LINEAR))
    ranks = ranks_of(model)
    of_layers = [{ranks[name] for name in ranks if f".layer.{k}." in name} for k in range(12)]
    assert of_layers == [{r} for r in (4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12)]
    assert sum(ranks.values()) == 72 * 8
    assert model.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 12, 24, 31, 80])
@pytest.mark.parametrize("r", [1, 2, 3, 5, 8, 16])
def test_of_any_depth_ranks_rise_evenly_and_average_r(r, layers):
    for first in {1, (r + 1) // 2, r}:
        config = PriLoraConfig(r=r, r_s=first)
        found = [rising(*config.ends(), place, layers) for place in range(layers)]
        assert sum(found) == r * layers
        assert found == sorted(found)
        if layers > 1:
            assert (found[0], found[-1]) == (first, 2 * r - first)
            exact = [first + (2 * r - 2 * first) * place / (layers - 1) for place in range(layers)]
            assert all(abs(one - other) <= 0.5 for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize(
    ("given", "ends"),
    [
        ({"r": 8}, (4, 12)),
        ({"r": 3}, (2, 4)),
        ({"r": 1}, (1, 1)),
        ({"r": 8, "r_s": 2}, (2, 14)),
        ({"r": 8, "r_f": 10}, (6, 10)),
        ({"r": 5, "r_s": 4, "r_f": 6}, (4, 6)),
        ({"r": 5, "r_s": 5}, (5, 5)),
    ],
)
def test_of_r_and_both_ends_two_make_the_third(given, ends):
    config = PriLoraConfig(**given)
    assert config.ends() == ends
    assert config.resolved() == {"r_s": ends[0], "r_f": ends[1]}


def test_a_layers_place_is_that_among_the_adapted_ones_of_its_stack():
    names = [
        "enc.layers.2.q",
        "enc.layers.10.q",
        "enc.layers.3.q",
        "dec.layers.0.q",
        "dec.layers.0.k",
        "head",
    ]
    assert depths(names) == {
        "enc.layers.2.q": (0, 3),
        "enc.layers.10.q": (2, 3),
        "enc.layers.3.q": (1, 3),
        "dec.layers.0.q": (0, 1),
        "dec.layers.0.k": (0, 1),
        "head": None,
    }


def test_each_stack_rises_by_itself_and_what_is_outside_has_r():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=16,
    )
    base = nn.ModuleDict({"bart": BartModel(config), "fc1": nn.Linear(16, 4)})
    ranks = ranks_of(get_peft_model(base, PriLoraConfig(r=4, target_modules=["fc1"])))
    assert {name.removeprefix("base_model.model."): rank for name, rank in ranks.items()} == {
        "bart.encoder.layers.0.fc1": 2,
        "bart.encoder.layers.1.fc1": 4,
        "bart.encoder.layers.2.fc1": 6,
        "bart.decoder.layers.0.fc1": 2,
        "bart.decoder.layers.1.fc1": 6,
        "fc1": 4,
    }


def test_layers_to_transform_rise_among_themselves(make_bert):
    config = PriLoraConfig(r=2, target_modules=["query"], layers_to_transform=[1, 3, 4])
    assert list(ranks_of(get_peft_model(make_bert(layers=6), config)).values()) == [1, 2, 3]


def test_a_rank_pattern_comes_first(make_bert):
    config = PriLoraConfig(r=4, target_modules=["query", "value"], rank_pattern={r"layer\.1\..*value": 9})
    ranks = ranks_of(get_peft_model(make_bert(), config))
    assert list(ranks.values()) == [2, 2, 6, 9]


def test_all_linear_layers_are_known_before_the_first_is_made(make_bert):
    ranks = ranks_of(get_peft_model(make_bert(layers=3), PriLoraConfig(r=2, target_modules="all-linear")))
    assert sorted(set(ranks.values())) == [1, 2, 3]
    assert ranks["base_model.model.bert.pooler.dense"] == 2


def test_a_saved_adapter_knows_every_rank_and_layer_1_is_not_layer_11(make_bert, tmp_path):
    model = get_peft_model(make_bert(layers=12), PriLoraConfig(r=8, target_modules=["query"]))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert sorted(saved.values()) == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]
    loaded = PeftModel.from_pretrained(make_bert(layers=12), tmp_path)
    assert ranks_of(loaded) == ranks_of(model)


def test_one_configuration_serves_models_of_different_depth(make_bert):
    config = PriLoraConfig(r=2, target_modules=["query"])
    assert list(ranks_of(get_peft_model(make_bert(layers=2), config)).values()) == [1, 3]
    assert list(ranks_of(get_peft_model(make_bert(layers=3), config)).values()) == [1, 2, 3]
    assert config.rank_pattern == {}


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, [8 / 2, 8 / 6]),
        ({"scaling": "average"}, [8 / 4, 8 / 4]),
        ({"use_rslora": True}, [8 / math.sqrt(2), 8 / math.sqrt(6)]),
        ({"use_rslora": True, "scaling": "average"}, [8 / 2, 8 / 2]),
    ],
)
def test_the_scale_is_alpha_over_the_rank_or_over_the_average(make_bert, settings, scales):
    config = PriLoraConfig(r=4, lora_alpha=8, target_modules=["query"], **settings)
    model = get_peft_model(make_bert(), config)
    found = [layer.scaling["default"] for layer in adapted_layers(model, "default").values()]
    assert found == pytest.approx(scales)


@pytest.mark.parametrize("scaling", ["rank", "average"])
def test_a_compact_export_has_each_layers_rank(make_bert, tmp_path, scaling):
    config = PriLoraConfig(
        r=2, target_modules=["query"], scaling=scaling, init_lora_weights=False, lora_alpha=5
    )
    model = get_peft_model(make_bert(layers=3), config).eval()
    export_lora(model, tmp_path, "compact")
    lora = PeftModel.from_pretrained(make_bert(layers=3), tmp_path).eval()
    assert list(ranks_of_lora(lora).values()) == [1, 2, 3]
    ids = torch.arange(5, 13).view(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(lora(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)


def ranks_of_lora(model):
    return {
        name: m.r["default"] for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "r")
    }


# The pruning.


class Literal:
    """The two-layer model with ``s B A`` formed whole, the running norms of its inputs, and AdamW."""

    def __init__(self, model, config, lr, decay):
        self.layers, self.config, self.inputs = layers_of(model), config, {}
        self.factors = {
            name: [p.detach().clone().requires_grad_() for p in layer.factors("default")]
            for name, layer in self.layers.items()
        }
        self.norms = {name: torch.zeros(SHAPES[name][1], dtype=torch.float64) for name in SHAPES}
        parameters = [p for pair in self.factors.values() for p in pair]
        self.optimizer = torch.optim.AdamW(parameters, lr, weight_decay=decay)

    def __call__(self, x):
        for name in SHAPES:
            (a, b), base = self.factors[name], self.layers[name].base_layer
            self.inputs[name] = x.detach()
            scale = self.config.lora_alpha / (len(a) if self.config.scaling == "rank" else self.config.r)
            x = functional.linear(x, base.weight + scale * b @ a, base.bias)
            x = torch.relu(x) if name == "lin0" else x
        return x

    def step(self, x, y, number, total):
        functional.mse_loss(self(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        config = self.config
        for name, norms in self.norms.items():
            mean_square = self.inputs[name].square().mean(0)
            norms.mul_(config.beta).add_((1 - config.beta) * mean_square.sqrt())
        if number % config.prune_every and not (config.prune_last and number == total):
            return
        for name, (a, _) in self.factors.items():
            with torch.no_grad():
                a.copy_(prune(a, self.norms[name], config.prune_share, config.prune_group == "row"))
            if config.prune_moments == "zero":
                for key in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[a][key][a == 0] = 0.0


FORMS = {
    "default": {"prune_every": 7},
    "every step": {"prune_every": 1, "prune_share": 0.3},
    "matrix": {"prune_every": 5, "prune_group": "matrix", "prune_share": 0.8},
    "slow average": {"prune_every": 4, "beta": 0.99},
    "no average": {"prune_every": 4, "beta": 0.0},
    "moments": {"prune_every": 3, "prune_moments": "zero"},
    "average scale": {"prune_every": 6, "scaling": "average", "rank_pattern": {"lin1": 2}},
    "last": {"prune_every": 100, "prune_last": True},
    "nothing": {"prune_share": 0.0, "prune_every": 1},
}


@pytest.mark.parametrize("form", FORMS)
def test_training_follows_the_method_written_down(make_plain, form):
    steps, lr, decay = 30, 2e-2, 0.1
    model = adapted(make_plain, **FORMS[form])
    literal = Literal(model, model.peft_config["default"], lr, decay)
    optimizer = optimizer_of(model, lr, decay)
    scheduler = attach(model, optimizer, total_steps=steps)
    for number, (x, y) in enumerate(batches(steps), 1):
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        literal.step(x, y, number, steps)
        for name, factors in factors_of(model).items():
            torch.testing.assert_close(
                factors, [p.detach() for p in literal.factors[name]], rtol=1e-7, atol=1e-9
            )
    zeros = sum(int((a == 0).sum()) for a, _ in factors_of(model).values())
    entries = sum(a.numel() for a, _ in factors_of(model).values())
    assert scheduler.logs()["pruned"] == zeros / entries
    scores = {
        name: float((a.abs() * literal.norms[name]).sum()) for name, (a, _) in factors_of(model).items()
    }
    assert scheduler.scores == pytest.approx(scores)


def test_right_after_an_event_each_row_has_exactly_the_share_of_zeros(make_plain):
    model = adapted(make_plain, prune_every=4, prune_share=0.4)
    optimizer = optimizer_of(model)
    attach(model, optimizer, total_steps=4)
    train(model, optimizer, 4)
    for name, (a, b) in factors_of(model).items():
        assert (a == 0).sum(1).tolist() == [math.floor(0.4 * SHAPES[name][1])] * len(a)
        assert b.all()


def test_pruned_entries_get_a_gradient_and_come_back_with_the_next_step(make_plain):
    model = adapted(make_plain, prune_every=4)
    optimizer = optimizer_of(model)
    attach(model, optimizer, total_steps=5)
    train(model, optimizer, 4)
    pruned = {name: a == 0 for name, (a, _) in factors_of(model).items()}
    x, y = next(batches(1, seed=6))
    functional.mse_loss(model(x), y).backward()
    for name, layer in layers_of(model).items():
        # What ReLU has shut for all rows of the batch has none.
        seen = layer.factors("default")[0].grad.any(0)
        assert int(seen.sum()) > 6
        assert layer.factors("default")[0].grad[pruned[name] & seen].all()
    optimizer.step()
    for name, (a, _) in factors_of(model).items():
        assert pruned[name].any()
        assert a[pruned[name]].all()


def test_a_trained_adapter_is_sparse_if_it_is_pruned_last(make_plain):
    for last, share in ((True, 0.5), (False, 0.0)):
        model = adapted(make_plain, prune_every=4, prune_last=last)
        optimizer = optimizer_of(model)
        scheduler = attach(model, optimizer, total_steps=6)
        train(model, optimizer, 6)
        assert scheduler.logs()["pruned"] == share


def test_pruning_last_needs_the_number_of_steps(make_plain):
    model = adapted(make_plain, prune_last=True)
    with pytest.raises(ValueError, match=r"total_steps=None: prune_last=True.*total_steps=\.\.\."):
        attach(model, optimizer_of(model))


def test_moments_that_are_not_one_for_each_entry_are_refused_long_before_they_would_be_pruned(make_plain):
    model = adapted(make_plain, prune_moments="zero", prune_every=1000)
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=0.01)
    attach(model, optimizer, total_steps=4)
    with pytest.raises(ValueError, match=r"prune_moments='zero': Adafactor keeps 'row_var'.*'keep'"):
        train(model, optimizer, 1)


def test_an_optimizer_without_moments_has_none_to_prune(make_plain):
    model = adapted(make_plain, prune_moments="zero", prune_every=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    attach(model, optimizer, total_steps=4)
    train(model, optimizer, 2)
    assert all((a == 0).any() for a, _ in factors_of(model).values())


class Branched(nn.Module):
    """Two layers, and beside the first one that is left out until it is opened."""

    def __init__(self):
        super().__init__()
        self.lin0, self.side, self.lin1 = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 6)
        self.opened = False

    def forward(self, x):
        hidden = self.lin0(x) + self.side(x) if self.opened else self.lin0(x)
        return self.lin1(torch.relu(hidden))


@pytest.mark.parametrize("group", ["row", "matrix"])
@pytest.mark.parametrize("moments", ["keep", "zero"])
def test_a_module_that_nothing_went_into_yet_is_not_pruned(group, moments):
    model = adapted(
        Branched, target_modules=["lin0", "side"], prune_every=3, prune_group=group, prune_moments=moments
    )
    before = factors_of(model)["side"][0]
    optimizer = optimizer_of(model)
    attach(model, optimizer, total_steps=20)
    train(model, optimizer, 6)
    # It would lose its first columns, of what it begins with, for good: nothing trains it.
    assert torch.equal(factors_of(model)["side"][0], before)
    assert pruned_shares(model) == {"lin0": 0.5, "side": 0.0}
    model.get_base_model().opened = True
    train(model, optimizer, 3)
    assert pruned_shares(model) == {"lin0": 0.5, "side": 0.5}


def pruned_shares(model):
    return {name: float((a == 0).double().mean()) for name, (a, _) in factors_of(model).items()}


def test_a_state_of_a_base_of_other_sizes_is_refused_by_name(make_plain):
    model = adapted(make_plain)
    attach(model, optimizer := optimizer_of(model), total_steps=4)
    other = adapted(lambda: nn.ModuleDict({"lin0": nn.Linear(8, 20), "lin1": nn.Linear(20, 6)}))
    again = optimizer_of(other)
    again.load_state_dict(optimizer.state_dict())
    with pytest.raises(
        ValueError, match=r"of modules with 32 input features in all, .* have 28; resume with"
    ):
        attach(other, again, total_steps=4)


# What goes in.


def norms_of(scheduler):
    return scheduler.policy.state_dict()["norms"]


def test_evaluation_does_not_count(make_plain):
    norms = []
    for evaluates in (False, True):
        model = adapted(make_plain, prune_every=3)
        optimizer = optimizer_of(model)
        scheduler = attach(model, optimizer, total_steps=10)
        for x, y in batches(10):
            if evaluates:
                with torch.no_grad():
                    model.eval()(100.0 * x)
                    model.train()(100.0 * x)
            functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        norms.append(norms_of(scheduler))
    assert norms[0].all()
    assert torch.equal(*norms)


def test_the_input_is_taken_before_dropout(make_plain):
    norms = []
    for dropout in (0.0, 0.5):
        model = adapted(make_plain, lora_dropout=dropout, target_modules=["lin0"])
        optimizer = optimizer_of(model)
        scheduler = attach(model, optimizer, total_steps=10)
        train(model, optimizer, 3)
        norms.append(norms_of(scheduler))
    assert norms[0].all()
    assert torch.equal(*norms)


def bert_norms(base, batch, *, targets=("query", "output.dense"), checkpointing=None, steps=1):
    torch.manual_seed(3)
    model = get_peft_model(base, PriLoraConfig(r=2, target_modules=list(targets))).double().train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    optimizer = optimizer_of(model)
    scheduler = attach(model, optimizer, total_steps=10)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return norms_of(scheduler)


IDS = torch.randint(5, 99, (3, 6), generator=torch.Generator().manual_seed(4))
LABELS = torch.tensor([0, 2, 1])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", ""])
def test_checkpointing_takes_the_input_once(make_bert, reentrant):
    batch = {"input_ids": IDS, "labels": LABELS}
    plain = bert_norms(make_bert().double(), batch, steps=3)
    checkpointed = bert_norms(make_bert().double(), batch, checkpointing=reentrant, steps=3)
    assert plain.all()
    torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=0.0)


def test_padding_does_not_count(make_bert):
    mask = torch.ones_like(IDS)
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": LABELS}
    padded = batch | {
        "input_ids": functional.pad(IDS, (0, 9), value=7),
        "attention_mask": functional.pad(mask, (0, 9)),
    }
    plain, other = (bert_norms(make_bert().double(), one) for one in (batch, padded))
    torch.testing.assert_close(other, plain, rtol=1e-9, atol=0.0)


def test_the_size_of_a_batch_does_not_matter(make_plain):
    norms = []
    for copies in (1, 3):
        model = adapted(make_plain)
        optimizer = optimizer_of(model)
        scheduler = attach(model, optimizer, total_steps=10)
        for x, y in batches(3):
            functional.mse_loss(model(x.repeat(copies, 1)), y.repeat(copies, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        norms.append(norms_of(scheduler))
    torch.testing.assert_close(*norms, rtol=1e-9, atol=0.0)


def test_a_batch_that_overflowed_under_a_fused_optimizer_does_not_count(make_plain):
    model = adapted(make_plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=True)
    scheduler = attach(model, optimizer, total_steps=10, scaler=scaler)
    found = []
    for (x, y), factor in zip(batches(3), (1.0, math.inf, 1.0), strict=True):
        scaler.scale(functional.mse_loss(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(norms_of(scheduler))
    assert scheduler.step == 2
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    # beta v + (1 - beta) n of two steps, not of three.
    seen = [x.square().mean(0).sqrt() for x, _ in batches(3)]
    wanted = 0.9 * (0.1 * seen[0]) + 0.1 * seen[2]
    torch.testing.assert_close(found[2][:12], wanted, rtol=1e-9, atol=0.0)


def test_a_resumed_training_of_another_method_is_refused_by_name(make_plain):
    model = adapted(make_plain)
    optimizer = optimizer_of(model)
    attach(model, optimizer, total_steps=10)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    other = get_peft_model(make_plain(), SoraConfig(target_modules=list(SHAPES), r=4)).double()
    again = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad])
    attach(other, again, total_steps=10)
    state["param_groups"][0]["params"] = again.state_dict()["param_groups"][0]["params"]
    with pytest.raises(ValueError, match=r"'prilora', but the adapter's method is 'sora'"):
        again.load_state_dict(state | {"state": {}})
