"""AdaLoRA: beside PEFT's own in one training, in float64, where PEFT's is right; right where it is not."""

import copy
import io
import math
import warnings

import increlora_rs
import numpy as np
import peft
import pytest
import torch
from increlora_rs import AdaLoraRsConfig, SoraConfig, attach, export_lora, growth_history, rank_table
from increlora_rs.compare.methods import names as compared
from increlora_rs.layers.found import adapted_layers
from method_cases import batch
from peft import AdaLoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch.nn import functional

STEPS = 200
TARGETS = ["query", "value", "intermediate.dense"]
MODULES = 6
LINEAR = {"target_modules": ["lin0", "lin1"], "r": 2, "init_r": 4}


def configure(**kwargs):
    return AdaLoraRsConfig(**(LINEAR | kwargs))


def adapted(make_plain, **kwargs):
    torch.manual_seed(3)
    return get_peft_model(make_plain(), configure(**kwargs), autocast_adapter_dtype=False).double()


def adamw(model, lr=1e-2, **kwargs):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, **kwargs)


def xy(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    return x, torch.sin(2.0 * x[:, :6])


def train(model, optimizer, steps):
    for step in steps:
        x, y = xy(step)
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def layers_of(model):
    return list(adapted_layers(model, "default").values())


def values_of(model):
    """E of every module."""
    return [layer.lora_E["default"].weight for layer in layers_of(model)]


def nonzero(model):
    return [int(e.count_nonzero()) for e in values_of(model)]


# Beside PEFT's.


def pair(make_bert, **settings):
    """PEFT's model and ours, of the same numbers, in float64."""
    shared = {"init_r": 4, "lora_alpha": 16, "target_modules": TARGETS, **settings}
    configs = AdaLoraConfig(target_r=2, total_step=STEPS, **shared), AdaLoraRsConfig(r=2, **shared)
    # PEFT trains the denominator of its scale where the base is not of float32 when it is adapted.
    theirs, ours = (get_peft_model(make_bert(), config).double() for config in configs)
    assert not [name for name, p in theirs.named_parameters() if "ranknum" in name and p.requires_grad]
    known = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                parameter.copy_(known[name.removesuffix(".weight")])
    return theirs.train(), ours.train()


SETTINGS = {
    "PEFT's schedule": {"tinit": 0, "tfinal": 0, "deltaT": 1, "orth_reg_weight": 0.5},
    "events apart": {"tinit": 20, "tfinal": 50, "deltaT": 10, "orth_reg_weight": 0.1},
    "long final phase": {"tinit": 30, "tfinal": 100, "deltaT": 1, "orth_reg_weight": 0.3, "beta1": 0.9},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_200_steps_are_those_of_pefts_adalora(make_bert, settings):
    theirs, ours = pair(make_bert, **settings)
    # Where factors are all but orthonormal, the norm of the regulariser has a kink, and roundings grow.
    optimizers = [adamw(model, lr=5e-4, weight_decay=0.01) for model in (theirs, ours)]
    scheduler = attach(ours, optimizers[1], total_steps=STEPS)
    known = dict(theirs.named_parameters())
    for t in range(STEPS):
        rows = batch(t)
        # Task-specific models alone go through the model that adds the regulariser.
        theirs.base_model(**rows).loss.backward()
        ours(**rows).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        theirs.base_model.update_and_allocate(t)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for name, parameter in ours.named_parameters():
            if "lora_E" in name:
                assert torch.equal(parameter != 0.0, known[name.removesuffix(".weight")] != 0.0), t
    assert scheduler.total_rank == sum(nonzero(ours)) == 2 * MODULES
    assert min(scheduler.ranks.values()) < max(scheduler.ranks.values())
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            wanted = known[name.removesuffix(".weight")]
            torch.testing.assert_close(parameter, wanted, rtol=1e-8, atol=1e-10)
    for ours_, theirs_ in zip(layers_of(ours), theirs_layers(theirs), strict=True):
        delta = theirs_.get_delta_weight("default")
        torch.testing.assert_close(ours_.get_delta_weight("default"), delta, rtol=1e-8, atol=1e-10)


def theirs_layers(model):
    return [module for module in model.modules() if isinstance(module, peft.tuners.adalora.SVDLinear)]


# Where PEFT's is not right.


@pytest.mark.parametrize("ranks", [{"r": 4}, {"r": 4, "tinit": 1, "tfinal": 1, "deltaT": 1}], ids=["", "all"])
def test_a_budget_of_all_that_is_there_masks_nothing(make_plain, ranks):
    model = adapted(make_plain, **ranks)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=20)
    train(model, optimizer, range(20))
    assert nonzero(model) == [4, 4]
    assert scheduler.total_rank == scheduler.budget == 8
    assert len(scheduler.history) == 0


@pytest.mark.parametrize("deltaT", [1, 7, 1000])
@pytest.mark.parametrize(("steps", "tfinal"), [(1, 0), (7, 0), (7, 1), (7, 6), (31, 0), (31, 5)])
def test_the_budget_is_met_whatever_the_schedule(make_plain, steps, tfinal, deltaT):
    model = adapted(make_plain, tinit=0, tfinal=tfinal, deltaT=deltaT)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=steps)
    train(model, optimizer, range(steps))
    assert sum(nonzero(model)) == scheduler.total_rank == scheduler.budget == 4


def test_the_number_of_steps_is_that_of_the_training(make_plain):
    ends = []
    for steps in (12, 40):
        model = adapted(make_plain)
        optimizer = adamw(model)
        scheduler = attach(model, optimizer, total_steps=steps)
        train(model, optimizer, range(steps))
        ends.append((scheduler.schedule.total_steps, sum(nonzero(model))))
    assert ends == [(12, 4), (40, 4)]
    with pytest.raises(TypeError, match="total_step"):
        configure(total_step=12)


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_the_regulariser_is_there_whatever_the_model_is_wrapped_in(make_bert, task):
    ends = []
    for weight in (0.0, 0.25):
        torch.manual_seed(3)
        config = AdaLoraRsConfig(
            r=1, init_r=2, target_modules=TARGETS, orth_reg_weight=weight, task_type=task
        )
        model = get_peft_model(make_bert().double(), config, autocast_adapter_dtype=False).double()
        before = [p.detach().clone() for layer in layers_of(model) for p in layer.factors("default")[:2]]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
        attach(model, optimizer, total_steps=10)
        model(**batch(0)).loss.backward()
        optimizer.step()
        ends.append([p.detach() for layer in layers_of(model) for p in layer.factors("default")[:2]])
    leaves = [p.clone().requires_grad_() for p in before]
    regulariser = sum(
        torch.linalg.matrix_norm(gram - torch.eye(2, dtype=torch.float64))
        for gram in [p @ p.t() if k % 2 == 0 else p.t() @ p for k, p in enumerate(leaves)]
    ) / len(leaves)
    # E is 0, so that A and B have no gradient but the regulariser's.
    for old, plain, moved, slope in zip(before, *ends, torch.autograd.grad(regulariser, leaves), strict=True):
        assert torch.equal(plain, old)
        torch.testing.assert_close(moved, old - 0.5 * 0.25 * slope, rtol=1e-10, atol=1e-13)


def test_no_loss_has_the_regulariser_in_it(make_bert):
    losses = []
    for weight in (0.0, 100.0):
        torch.manual_seed(3)
        config = AdaLoraRsConfig(r=1, target_modules=TARGETS, orth_reg_weight=weight, task_type="SEQ_CLS")
        model = get_peft_model(make_bert(), config)
        attach(model, adamw(model), total_steps=10)
        losses.append([model.train(mode)(**batch(0)).loss.item() for mode in (True, False)])
    assert losses[0] == losses[1]


def test_a_weight_of_0_takes_the_regulariser_off(make_plain):
    model = adapted(make_plain, orth_reg_weight=0.0)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=12)
    train(model, optimizer, range(12))
    assert scheduler.orth_reg > 0.0 and sum(nonzero(model)) == 4


def test_an_adapter_that_is_loaded_for_inference_gives_a_loss(make_bert, tmp_path):
    config = AdaLoraRsConfig(r=1, target_modules=TARGETS, task_type="SEQ_CLS")
    model = get_peft_model(make_bert(), config).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path)
    assert not loaded.training
    for each in (loaded, loaded.base_model):
        assert torch.equal(each(**batch(0)).loss, model(**batch(0)).loss)


def test_of_equal_scores_no_more_are_masked_than_the_budget_says(make_plain):
    model = adapted(make_plain, init_lora_weights=False, tinit=0, tfinal=0, deltaT=1, orth_reg_weight=0.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    scheduler = attach(model, optimizer, total_steps=12)
    budgets = []
    for _ in range(12):
        for parameter in model.parameters():
            # All scores are 0.
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        budgets.append(scheduler.schedule.budget(scheduler.step))
        assert scheduler.total_rank == sum(nonzero(model)) == budgets[-1]
    assert budgets[0] == 8 and budgets[-1] == 4


def test_a_masked_triplet_may_come_back(make_plain):
    model = adapted(make_plain, init_lora_weights=False, tinit=0, tfinal=0, deltaT=1, orth_reg_weight=0.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    scheduler = attach(model, optimizer, total_steps=40)
    ranks = []
    for step in range(40):
        # The loss depends on lin0 at first, then on lin1, and more.
        for layer, slope in zip(layers_of(model), (1.0, 0.0) if step < 20 else (0.0, 10.0), strict=True):
            for parameter in layer.factors("default"):
                parameter.grad = torch.full_like(parameter, slope)
        optimizer.step()
        ranks.append(list(scheduler.ranks.values()))
    assert ranks[19][0] == 4 and ranks[19][1] < 3
    assert ranks[-1] == nonzero(model) == [0, 4]


def test_nothing_is_called_by_hand_and_gradients_may_be_set_to_zero_at_any_place(make_plain):
    ends = []
    for first in (True, False):
        model = adapted(make_plain)
        optimizer = adamw(model)
        scheduler = attach(model, optimizer, total_steps=12)
        for step in range(12):
            x, y = xy(step)
            if first:
                optimizer.zero_grad()
            functional.mse_loss(model(x), y).backward()
            optimizer.step()
            if not first:
                optimizer.zero_grad(set_to_none=False)
        ends.append((scheduler.ranks, [p.detach() for p in model.parameters() if p.requires_grad]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


def test_a_module_that_no_gradient_reaches_is_masked_first(make_plain):
    model = adapted(make_plain, r=2, init_r=4)
    lin0 = model.get_submodule("base_model.model.lin0")
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=12)
    for step in range(12):
        x, y = xy(step)
        # Past lin1.
        functional.mse_loss(torch.relu(lin0(x))[:, :6], y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scheduler.ranks == {"lin0": 4, "lin1": 0}


def test_an_injected_adapter_needs_no_method_of_a_model(make_plain):
    torch.manual_seed(3)
    model = inject_adapter_in_model(configure(), make_plain()).double()
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=12)
    train(model, optimizer, range(12))
    assert scheduler.total_rank == sum(nonzero(model)) == 4


def test_factors_that_are_orthonormal_get_no_gradient_that_is_not_finite(make_plain):
    model = adapted(make_plain, orth_reg_weight=1.0)
    with torch.no_grad():
        for layer in layers_of(model):
            a, b, _ = layer.factors("default")
            a.copy_(torch.eye(*a.shape))
            b.copy_(torch.eye(*b.shape))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    scheduler = attach(model, optimizer, total_steps=12)
    assert scheduler.orth_reg == 0.0
    train(model, optimizer, range(12))
    assert all(torch.isfinite(p).all() for p in model.parameters())


# What is left at the end.


@pytest.fixture
def pruned(make_plain):
    """A trained model of which lin1 has nothing left."""
    model = adapted(make_plain, init_lora_weights=False).float()
    with torch.no_grad():
        first, second = values_of(model)
        first[1] = 0.0
        second.zero_()
    return model.eval()


def test_a_module_of_rank_0_is_saved_and_loaded(pruned, make_plain, plain_input, tmp_path):
    pruned.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(make_plain(), tmp_path, is_trainable=trainable).eval()
        assert torch.equal(loaded(plain_input), pruned(plain_input))
        assert nonzero(loaded) == [3, 0]
        # All rows are there, so that what is masked may come back.
        assert [layer.rank("default") for layer in layers_of(loaded)] == [4, 4]


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_an_export_has_the_live_triplets_alone(pruned, make_plain, plain_input, tmp_path, layout):
    export = export_lora(pruned, tmp_path, layout)
    assert (export.config.r, export.error) == (3, 0.0)
    plain = PeftModel.from_pretrained(make_plain(), tmp_path).eval()
    torch.testing.assert_close(plain(plain_input), pruned(plain_input))
    assert {tuple(p.shape) for n, p in plain.named_parameters() if "lora_A" in n} == {(3, 12)}


def test_tables_and_the_model_card_tell_the_ranks_that_are_left(pruned, tmp_path):
    table = rank_table(pruned)
    assert (table.total_rank, table.budget) == (3, 4)
    pruned.save_pretrained(tmp_path)
    assert "2 modules, ranks 0 to 3, total 3 of a budget of 4" in (tmp_path / "README.md").read_text()


def test_the_scale_stays_that_of_the_ranks_at_the_start(make_plain):
    model = adapted(make_plain, rank_pattern={"lin1": 2}, lora_alpha=6)
    scales = [layer.scaling["default"] for layer in layers_of(model)]
    assert scales == [6 / (4 + 1e-5), 6 / (2 + 1e-5)]
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=12)
    train(model, optimizer, range(12))
    assert sum(nonzero(model)) == 4
    assert [layer.scaling["default"] for layer in layers_of(model)] == scales
    x, _ = xy(50)
    with torch.no_grad():
        wanted = model.eval()(x)
        torch.testing.assert_close(model.merge_and_unload()(x), wanted, rtol=1e-12, atol=1e-12)


# While it trains.


def test_ranks_are_those_of_the_last_mask_event_and_stand_in_the_history(make_plain, tmp_path):
    model = adapted(make_plain, tinit=3, tfinal=10, deltaT=5)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=40)
    assert scheduler.total_rank == 8
    for step in range(40):
        train(model, optimizer, [step])
        schedule, number = scheduler.schedule, scheduler.step
        assert scheduler.total_rank >= schedule.budget(number)
        if schedule.is_event(number) or schedule.holds(number):
            assert list(scheduler.ranks.values()) == nonzero(model)
            assert scheduler.total_rank == schedule.budget(number)
        else:
            # Between two events the optimizer moves what is masked.
            assert nonzero(model) == [4, 4]
    steps = scheduler.history["step"]
    assert len(steps) and all(schedule.is_event(int(step)) for step in steps)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        history = growth_history(source)
        assert (history.budget, history.first_ranks) == (4, [4, 4])
        assert history.ranks[-1] == list(scheduler.ranks.values())
        totals = [sum(ranks) for ranks in history.ranks]
        assert totals == sorted(totals, reverse=True)


def test_between_two_events_too_the_history_is_there(make_plain, tmp_path):
    model = adapted(make_plain, tinit=3, tfinal=10, deltaT=5)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=40)
    train(model, optimizer, range(13))
    # Masked after step 11, and moved since.
    assert scheduler.total_rank < sum(nonzero(model)) == 8
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        assert growth_history(source).steps == [6, 11]
        assert growth_history(source).ranks[-1] == list(scheduler.ranks.values())


def test_after_the_last_event_what_is_masked_stays_so_and_nothing_is_kept_for_a_choice(make_plain):
    model = adapted(make_plain, tinit=2, tfinal=8, deltaT=1)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=20)
    train(model, optimizer, range(13))
    left, scores = [e == 0.0 for e in values_of(model)], scheduler.scores
    assert sum(nonzero(model)) == 4
    assert scheduler.policy.state_dict()["sensitivities"] is None
    for step in range(13, 24):
        train(model, optimizer, [step])
        assert all(torch.equal(e == 0.0, was) for e, was in zip(values_of(model), left, strict=True))
    assert scheduler.scores == scores
    assert all(score > 0.0 for score in scores.values())


def test_a_training_that_ends_early_tells_that_the_budget_was_not_met(make_plain):
    model = adapted(make_plain, tinit=3, tfinal=10, deltaT=5)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=40)
    train(model, optimizer, range(18))
    assert scheduler.total_rank == scheduler.schedule.budget(16) < 8
    with pytest.warns(
        UserWarning, match=r"rank of 8, above the budget of 4, .* from step 31 on: .*step 18 of 40;"
    ):
        scheduler.detach()
    # Since the last event all have left 0.
    assert list(scheduler.ranks.values()) == nonzero(model) == [4, 4]


def test_an_earlier_adapter_that_is_loaded_at_the_end_is_told_with_its_ranks(make_plain):
    model = adapted(make_plain, tinit=3, tfinal=10, deltaT=5)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=20)
    train(model, optimizer, range(8))
    best = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(8, 20))
    assert scheduler.total_rank == 4
    model.load_state_dict(best)
    with pytest.warns(UserWarning, match=r"rank of 8, .* from step 11 on: .*load_best_model_at_end"):
        scheduler.detach()
    assert list(scheduler.ranks.values()) == nonzero(model) == [4, 4]


def test_a_training_that_was_whole_ends_without_a_word(make_plain):
    model = adapted(make_plain)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=20)
    train(model, optimizer, range(20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.detach()
    assert scheduler.total_rank == sum(nonzero(model)) == 4


def test_logs_tell_the_ranks_and_the_regulariser(make_plain):
    model = adapted(make_plain)
    scheduler = attach(model, adamw(model), total_steps=20)
    assert scheduler.logs() == {"total_rank": 8, "orth_reg": scheduler.orth_reg}
    assert set(scheduler.scalars()) == {
        f"adalora_rs/{kind}/{name}" for kind in ("rank", "score") for name in ("lin0", "lin1")
    }


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [1, 8, 15, 22], ids=["before", "between events", "at one", "after the last"])
def test_a_training_resumes_bit_for_bit_at_any_place_of_the_schedule(make_plain, stop):
    whole, first = (adapted(make_plain, tinit=3, tfinal=10, deltaT=7) for _ in range(2))
    optimizer = adamw(whole)
    scheduler = attach(whole, optimizer, total_steps=30)
    train(whole, optimizer, range(30))
    optimizer = adamw(first)
    attach(first, optimizer, total_steps=30)
    train(first, optimizer, range(stop))
    second = copy.deepcopy(first)
    again = adamw(second)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    resumed = attach(second, again, total_steps=30)
    train(second, again, range(stop, 30))
    assert resumed.ranks == scheduler.ranks
    assert np.array_equal(resumed.history, scheduler.history)
    assert resumed.scores == scheduler.scores
    for found, wanted in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_a_resumed_training_goes_on_by_its_schedule_and_tells_another(make_plain):
    model = adapted(make_plain, tinit=3, tfinal=10, deltaT=7)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=30)
    train(model, optimizer, range(5))
    other = adapted(make_plain, r=1, tinit=4, tfinal=10, deltaT=1)
    again = adamw(other)
    again.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning) as told:
        scheduler = attach(other, again, total_steps=40)
    words = " ".join(str(warning.message) for warning in told)
    assert all(text in words for text in ("r=1", "tinit=4", "deltaT=1", "total_steps=40"))
    assert "tfinal" not in words
    schedule = scheduler.schedule
    assert (schedule.total_steps, schedule.tinit, schedule.deltaT, scheduler.budget) == (30, 3, 7, 4)


def test_a_checkpoint_of_another_method_or_of_other_ranks_is_refused_by_name(make_plain):
    model = adapted(make_plain)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=12)
    train(model, optimizer, range(3))
    state = optimizer.state_dict()
    sora = get_peft_model(make_plain(), SoraConfig(target_modules=["lin0", "lin1"], r=4)).double()
    again = adamw(sora)
    again.load_state_dict(state)
    with pytest.raises(ValueError, match=r"a training with 'adalora_rs', .* method is 'sora'"):
        attach(sora, again, total_steps=12)
    # In all as many as there were.
    for ranks, told in (
        ({"init_r": 3}, "4 .*'lin0', .* with 3"),
        ({"rank_pattern": {"lin0": 5, "lin1": 3}}, "4 .*'lin0', .* with 5"),
    ):
        other = adapted(make_plain, **ranks)
        again = adamw(other)
        again.load_state_dict(state)
        with pytest.raises(ValueError, match=rf"state is of {told}; .*init_r"):
            attach(other, again, total_steps=12)


def test_a_state_of_a_base_of_other_sizes_is_refused_by_name(make_plain):
    model = adapted(make_plain)
    attach(model, optimizer := adamw(model), total_steps=12)
    other = adapted(
        lambda: torch.nn.ModuleDict({"lin0": torch.nn.Linear(8, 20), "lin1": torch.nn.Linear(20, 6)})
    )
    again = adamw(other)
    again.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"of 240 trained numbers, .* has 224; resume with the base model"):
        attach(other, again, total_steps=12)


# Bad arguments.


def test_the_rank_at_the_start_is_half_as_much_again():
    assert [AdaLoraRsConfig(r=r).first_rank for r in (1, 2, 3, 8)] == [2, 3, 5, 12]
    assert AdaLoraRsConfig(r=8).resolved() == {"init_r": 12}
    assert AdaLoraRsConfig(r=8, init_r=9).rank_at("lin0") == 9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r": 5}, ValueError, r"r=5 is above init_r=4.*raise init_r"),
        ({"init_r": 4.0}, TypeError, r"init_r=4\.0"),
        ({"beta1": 1.0}, ValueError, r"beta1=1\.0"),
        ({"tinit": -1}, ValueError, r"tinit=-1"),
        ({"deltaT": 0}, ValueError, r"deltaT=0"),
        ({"orth_reg_weight": math.nan}, ValueError, r"orth_reg_weight=nan"),
        ({"init_lora_weights": "svd"}, ValueError, r"init_lora_weights='svd'"),
        ({"use_dora": "yes"}, ValueError, r"use_dora='yes'"),
        ({"target_r": 2}, TypeError, r"target_r"),
    ],
)
def test_a_bad_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        configure(**arguments)


@pytest.mark.parametrize(
    ("arguments", "steps", "message"),
    [
        ({"tinit": 12, "tfinal": 8}, 20, r"tinit=12 and tfinal=8 leave none of the 20 steps.*lower one"),
        ({"tinit": 20}, 20, r"tinit=20"),
        ({"tfinal": 30}, 20, r"tfinal=30"),
        (
            {"rank_pattern": {"lin0": 1, "lin1": 1}},
            20,
            r"r=2: 2 modules .* 4 components, but begin with 2.*rank_pattern",
        ),
        ({}, None, r"total_steps=None.*attach\(\.\.\., total_steps=\.\.\.\)"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_before_the_first_step(make_plain, arguments, steps, message):
    model = adapted(make_plain, **arguments)
    with pytest.raises(ValueError, match=message):
        attach(model, adamw(model), total_steps=steps)


def test_a_refused_attach_leaves_a_model_that_trains(make_plain):
    model = adapted(make_plain, tinit=20)
    optimizer = adamw(model)
    with pytest.raises(ValueError, match="tinit=20"):
        attach(model, optimizer, total_steps=20)
    attach(model, optimizer, total_steps=30)
    train(model, optimizer, range(30))
    assert sum(nonzero(model)) == 4


def test_a_scale_that_is_not_the_configurations_is_refused_with_the_class_to_load_it_with(make_plain):
    model = adapted(make_plain)
    layers_of(model)[0].set_scale("default", 2.0)
    with pytest.raises(ValueError, match=r"'lin0' has the scale .* config=AdaLoraRsConfig\(r="):
        attach(model, adamw(model), total_steps=20)


def test_the_names_are_public_and_those_of_peft_stay_its_own():
    assert "AdaLoraRsConfig" in increlora_rs.__all__
    assert {"adalora", "adalora_rs"} <= set(compared())
    assert peft.PeftType("ADALORA") != configure().peft_type == "ADALORA_RS"
