"""Modules of rank 0: one has nothing until it is chosen, and a budget may be less than one for each."""

import io
import itertools
import warnings

import peft
import pytest
import torch
from growing import growing
from increlora_rs import attach, convert_lora
from increlora_rs.support.budget import Budget
from increlora_rs.training.modules import adapted_modules
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTHS = (6, 8, 7, 5)
GROWTH = 5
FROM_NOTHING = {"init_r": 0, "tinit": 4, "deltaT": GROWTH, "top_h": 1, "importance_window": 3}


class Chain(nn.Module):
    """Linear maps with tanh between them; in training, on demand, computed anew in the backward pass."""

    def __init__(self, checkpointed=None):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(WIDTHS))
        self.checkpointed = checkpointed

    def _run(self, x):
        for layer in self.maps[:-1]:
            x = torch.tanh(layer(x))
        return self.maps[-1](x)

    def forward(self, x):
        if self.checkpointed is None:
            return self._run(x)
        return checkpoint(self._run, x, use_reentrant=self.checkpointed == "reentrant")


def adapted(dtype=torch.float64, checkpointed=None, **options):
    torch.manual_seed(3)
    targets = [f"maps.{i}" for i in range(len(WIDTHS) - 1)]
    config = {"r": 3, "lora_alpha": 6, "target_modules": targets} | FROM_NOTHING | options
    return peft.get_peft_model(Chain(checkpointed), growing(**config)).to(dtype)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model, **options):
    return torch.optim.AdamW(trainable(model), lr=1e-2, **options)


def loss_of(model, t, rows=slice(None)):
    generator = torch.Generator().manual_seed(t)
    dtype = next(model.parameters()).dtype
    x = torch.randn(12, WIDTHS[0], generator=generator, dtype=torch.float64).to(dtype)
    return nn.functional.mse_loss(model(x[rows]), torch.sin(3 * x[rows, : WIDTHS[-1]]))


def train(model, optimizer, first, last):
    for t in range(first, last + 1):
        loss_of(model, t).backward()
        optimizer.step()
        optimizer.zero_grad()


def mean_gradients(model, steps):
    """The mean gradient of each module's weight over the batches of the steps, by autograd on the weight."""
    plain = Chain().double()
    with torch.no_grad():
        for layer, adapted_layer in zip(plain.maps, model.get_base_model().maps, strict=True):
            layer.weight.copy_(adapted_layer.get_base_layer().weight)
            layer.bias.copy_(adapted_layer.get_base_layer().bias)
    sum(loss_of(plain, t) for t in steps).backward()
    return [layer.weight.grad / len(steps) for layer in plain.maps]


# The configuration.


@pytest.mark.parametrize("r", [0.25, 1.5, 0.9])
def test_a_fraction_is_a_budget(r):
    assert growing(r=r, init_r=0).r == r


@pytest.mark.parametrize(
    ("r", "kind"),
    [(-0.5, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), (0.0, TypeError)],
)
def test_a_wrong_fraction_is_refused_by_name_and_value(r, kind):
    with pytest.raises(kind, match=f"r={r}"):
        growing(r=r, init_r=0)


def test_a_budget_below_the_first_rank_names_the_way_out():
    with pytest.raises(ValueError, match=r"r=0.5 is below init_r=1.*with 0 a module has nothing"):
        growing(r=0.5, init_r=1)


def test_nothing_is_chosen_by_the_sensitivity_of_nothing():
    with pytest.raises(ValueError, match="init_r=0 and importance='sensitivity'"):
        growing(init_r=0, importance="sensitivity")


def test_ranks_that_all_are_zero_by_pattern_cannot_be_chosen_by_the_sensitivity():
    model = adapted(init_r=1, rank_pattern={"maps": 0, "maps.[012]": 0}, importance="sensitivity")
    with pytest.raises(ValueError, match=r"rank_pattern=.* makes every rank 0"):
        attach(model, adamw(model), total_steps=100)


def test_other_methods_keep_a_rank_of_one_or_more():
    from increlora_rs import SoraConfig

    for options in ({"r": 0.5}, {"r": 0}, {"rank_pattern": {"a": 0}}):
        with pytest.raises((TypeError, ValueError)):
            SoraConfig(**options)


@pytest.mark.parametrize(
    ("r", "unit", "total"),
    [
        (0.25, "rank", 1),
        (0.5, "rank", 2),
        (1.5, "rank", 6),
        (2, "rank", 8),
        # Never less than one component, the cheapest.
        (0.01, "rank", 1),
        (0.001, "parameters", 2 + 3 + 1),
        (0.5, "parameters", 24),
    ],
)
def test_the_budget_is_rounded_and_pays_for_one_component(r, unit, total):
    assert Budget.of(r, unit, [(2, 3), (4, 5), (6, 7), (8, 9)]).total == total


@pytest.mark.parametrize(
    ("options", "rank", "scale"),
    [
        ({"r": 0.25, "init_r": 0}, 0, 16.0),
        ({"r": 0.25, "init_r": 0}, 3, 16.0),
        ({"r": 0.25, "init_r": 0, "use_rslora": True}, 1, 16.0),
        ({"r": 2.5}, 1, 6.4),
        ({"r": 0.5, "init_r": 0, "scaling": "rank"}, 0, 16.0),
        ({"r": 0.5, "init_r": 0, "scaling": "rank"}, 4, 4.0),
    ],
)
def test_alpha_is_divided_by_one_or_more(options, rank, scale):
    assert growing(**options).scale(16, rank) == scale


def test_the_gaussian_of_a_small_budget_is_no_wider_than_that_of_one_component():
    config = growing(r=0.01, init_r=0, init_lora_weights="gaussian", target_modules=["maps.0"])
    model = peft.get_peft_model(Chain(), config)
    (module,) = adapted_modules(model, "default")
    a = module.structure.draw(module.layer.site, 5, config)["lora_A"]
    assert a.abs().max() < 6.0


# Shapes, and what a model with nothing in it says of itself.


def test_parameters_of_rank_zero_have_no_element_and_are_trainable():
    for module in adapted_modules(adapted(), "default"):
        out, features = module.layer.out_features, module.layer.in_features
        assert [tuple(p.shape) for p in module.factors] == [(0, features), (out, 0), (0, 1)]
        assert all(p.requires_grad for p in module.factors)


def test_a_model_with_nothing_in_it_counts_no_trainable_parameter():
    model = adapted()
    assert model.get_nb_trainable_parameters()[0] == 0
    model.print_trainable_parameters()


def test_nothing_warns_of_empty_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapted()
        optimizer = adamw(model)
        attach(model, optimizer, total_steps=100)
        train(model, optimizer, 1, 12)


# Growth.


def test_the_scores_of_modules_that_have_nothing_are_the_gradients_leading_singular_values():
    model = adapted()
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    gradients = mean_gradients(model, range(GROWTH - 2, GROWTH + 1))
    train(model, optimizer, 1, GROWTH)
    assert scheduler.step == GROWTH
    for score, gradient in zip(scheduler.scores.values(), gradients, strict=True):
        assert score == pytest.approx(float(torch.linalg.svdvals(gradient)[0]), rel=1e-6)


def test_the_first_to_grow_is_the_one_that_would_gain_most():
    model = adapted()
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, GROWTH)
    best = max(scheduler.scores, key=scheduler.scores.get)
    assert scheduler.ranks == {name: int(name == best) for name in scheduler.ranks}


@pytest.mark.parametrize("r", [3, 1, 0.67, 0.25])
@pytest.mark.parametrize("unit", ["rank", "parameters"])
def test_ranks_grow_from_nothing_to_the_budget(r, unit):
    model = adapted(r=r, budget_unit=unit, dtype=torch.float32, top_h=None)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, 100)
    assert scheduler.total_rank >= 1
    if unit == "rank":
        assert scheduler.total_rank == scheduler.budget == max(round(3 * r), 1)


@pytest.mark.parametrize("window", [3, None, "auto"])
def test_every_step_has_a_gradient_while_there_is_nothing(window):
    model = adapted(importance_window=window, tinit=19)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    for t in range(1, 20):
        loss_of(model, t).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert scheduler.step == t


def test_a_module_with_nothing_takes_no_part_in_steps_that_measure_nothing():
    model = adapted(rank_pattern={"maps.2": 1})
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=100)
    first, _, last = adapted_modules(model, "default")
    assert not first.layer.probes["default"].armed
    loss_of(model, 1).backward()
    assert [p.grad is None for p in first.factors + last.factors] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("checkpointed", ["reentrant", "not reentrant"])
def test_checkpointed_blocks_measure_the_same(checkpointed):
    scores = []
    for how in (None, checkpointed):
        model = adapted(checkpointed=how)
        if how == "reentrant":
            # That form has no gradient but through its input.
            model.register_forward_pre_hook(lambda _, args: (args[0].requires_grad_(),))
        optimizer = adamw(model)
        scheduler = attach(model, optimizer, total_steps=100)
        train(model, optimizer, 1, GROWTH)
        scores.append(list(scheduler.scores.values()))
    assert scores[0] == pytest.approx(scores[1], rel=1e-12)


def test_micro_batches_count_as_their_sum():
    scores = []
    for parts in (1, 3):
        model = adapted()
        optimizer = adamw(model)
        scheduler = attach(model, optimizer, total_steps=100)
        for t in range(1, GROWTH + 1):
            for part in range(parts):
                (loss_of(model, t, slice(part * 12 // parts, (part + 1) * 12 // parts)) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        scores.append(list(scheduler.scores.values()))
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)


def test_a_first_step_at_learning_rate_zero_counts():
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.0)
    scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, 1)
    assert scheduler.step == 1


def test_components_in_reserve_learn_where_no_component_counts_yet():
    model = adapted(init_lora_weights="svd", scaling="rank", importance="gradient")
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, 100)
    assert scheduler.total_rank == scheduler.budget


def test_by_the_sensitivity_a_module_without_components_has_score_zero_and_no_warning():
    model = adapted(
        init_r=1, rank_pattern={"maps.1": 0}, importance="sensitivity", importance_window=None, tinit=4
    )
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1, 2 * GROWTH)
    assert scheduler.scores["maps.1"] == 0.0
    assert scheduler.ranks["maps.1"] == 0


# Optimizers.

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:the state")
def test_optimizers_hold_empty_parameters_and_train_what_grows_of_them(name):
    model = adapted(dtype=torch.float32)
    optimizer = OPTIMIZERS[name](trainable(model))
    scheduler = attach(model, optimizer, total_steps=100)
    before = loss_of(model, 0).item()
    train(model, optimizer, 1, 100)
    assert scheduler.total_rank == scheduler.budget
    assert loss_of(model, 0).item() < before


def test_an_optimizer_has_no_state_of_a_parameter_without_elements():
    model = adapted()
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, GROWTH - 1)
    assert not optimizer.state


def test_adam_counts_the_steps_of_a_first_row_as_those_of_all_others():
    """The restart warm-up corrects new rows by the number of steps that Adam counts of their parameter."""
    model = adapted(rank_pattern={"maps.2": 1}, top_h=3)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=100)
    train(model, optimizer, 1, GROWTH + 2)
    counts = {float(optimizer.state[p]["step"]) for p in trainable(model)}
    assert counts == {GROWTH + 2.0}


@pytest.mark.parametrize("number", [0.25, 3])
def test_a_scaler_of_float16_finds_gradients_to_look_at(number):
    model = adapted(r=number, dtype=torch.float32)
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler("cpu")
    scheduler = attach(model, optimizer, total_steps=100, scaler=scaler)
    for t in range(1, GROWTH + 1):
        scaler.scale(loss_of(model, t)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert (scheduler.step, scheduler.total_rank) == (GROWTH, 1)


# Resuming.


@pytest.mark.parametrize("stop", [3, GROWTH, GROWTH + 1])
def test_a_resumed_training_goes_on_bit_for_bit(stop):
    whole = adapted()
    optimizer = adamw(whole)
    attach(whole, optimizer, total_steps=100)
    train(whole, optimizer, 1, 2 * GROWTH + 2)
    first = adapted()
    optimizer = adamw(first)
    attach(first, optimizer, total_steps=100)
    train(first, optimizer, 1, stop)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    resumed = adapted()
    resumed.load_state_dict(saved["model"])
    optimizer = adamw(resumed)
    attach(resumed, optimizer, total_steps=100)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, stop + 1, 2 * GROWTH + 2)
    for found, wanted in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_a_state_of_rank_zero_is_loaded_over_an_adapter_that_has_grown():
    nothing, grown = adapted(), adapted(init_r=2)
    grown.load_state_dict(nothing.state_dict())
    assert [module.rank for module in adapted_modules(grown, "default")] == [0, 0, 0]
    grown = adapted(init_r=2)
    nothing.load_state_dict(grown.state_dict())
    assert [module.rank for module in adapted_modules(nothing, "default")] == [2, 2, 2]


def test_converting_keeps_to_ranks_of_one_or_more(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["maps.0"])
    peft.get_peft_model(Chain(), config).save_pretrained(tmp_path / "lora")
    converted = convert_lora(tmp_path / "lora", tmp_path / "converted")
    assert (converted.r, converted.rank_pattern) == (1, {"^maps.0": 1})
