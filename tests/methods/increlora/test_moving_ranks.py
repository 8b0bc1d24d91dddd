"""Ranks that move, from LoRA's first step to the ranks that it ends with."""

import copy
import io

import numpy as np
import peft
import pytest
import torch
from increlora_rs import IncreLoraCallback, IncreLoraConfig, _core, attach, export_lora, growth_history
from increlora_rs.methods.increlora.growth import Growth
from increlora_rs.methods.increlora.moves import Moves, MoveSchedule
from torch import nn

SIZES = {"first": (24, 16), "second": (24, 24), "third": (16, 24)}
STEPS = 120
# Of A, B and E of one component of each.
COSTS = [out + features + 1 for out, features in SIZES.values()]


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, (out, features) in SIZES.items():
            layer = nn.Linear(features, out, bias=False)
            layer.weight.data = torch.randn(out, features, generator=generator) / features**0.5
            setattr(self, name, layer)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def teacher(planted="second", rank=6):
    model = Chain()
    weight = getattr(model, planted).weight
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.randn(size, rank, generator=generator) for size in weight.shape)
    weight.data += left @ right.T * (weight.norm() / (left @ right.T).norm())
    return model


def adapted(base=None, **settings):
    torch.manual_seed(5)
    config = IncreLoraConfig(
        **({"r": 2, "importance": "fluctuation", "lora_alpha": 8, "target_modules": list(SIZES)} | settings)
    )
    return peft.get_peft_model(base or Chain(), config)


def adamw(model, lr=1e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def batch(step):
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, goal, first=1, last=STEPS, look=None):
    for step in range(first, last + 1):
        x = batch(step)
        (model(x) - goal(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if look is not None:
            look(step)


def error(model, goal):
    x = torch.cat([batch(10_000 + k) for k in range(8)])
    with torch.no_grad():
        return (model(x) - goal(x)).square().mean().item()


@pytest.fixture(scope="module")
def ended():
    """A training, with the ranks after each step."""
    goal, model = teacher(), adapted()
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    ranks = []
    train(model, optimizer, goal, look=lambda step: ranks.append(list(scheduler.ranks.values())))
    return model, scheduler, ranks, goal


# What it does.


def test_every_module_begins_at_the_budgets_rank(ended):
    _, scheduler, ranks, _ = ended
    assert all(of_all == [2, 2, 2] for of_all in ranks[: scheduler.schedule.tinit - 1])


def test_components_go_to_the_module_that_needs_them(ended):
    assert ended[2][-1][1] == max(ended[2][-1]) > 2


def test_all_ranks_together_never_take_more_than_the_budget(ended):
    _, scheduler, ranks, _ = ended
    spent = [sum(rank * cost for rank, cost in zip(of_all, COSTS, strict=True)) for of_all in ranks]
    assert max(spent) <= scheduler.budget == 2 * sum(COSTS)


def test_no_rank_moves_after_the_end(ended):
    _, scheduler, ranks, _ = ended
    after = ranks[scheduler.schedule.end :]
    assert after == [ranks[-1]] * len(after)


def test_it_ends_below_lora_of_the_same_size(ended):
    model, _, _, goal = ended
    plain = peft.get_peft_model(Chain(), peft.LoraConfig(r=2, lora_alpha=8, target_modules=list(SIZES)))
    train(plain, adamw(plain), goal)
    assert error(model, goal) < 0.75 * error(plain, goal)


def test_the_history_has_the_ranks_that_fell(ended):
    model, _, ranks, _ = ended
    history = growth_history(model)
    assert list(history.ranks[-1]) == ranks[-1]
    assert any(now < before for now, before in zip(ranks[-1], ranks[0], strict=True))


def test_the_configuration_is_kept_up_to_date(ended):
    model, _, ranks, _ = ended
    assert [model.peft_config["default"].rank_at(name) for name in SIZES] == ranks[-1]


def test_a_move_loses_what_the_removed_components_did_and_nothing_else():
    goal, model = teacher(), adapted()
    optimizer = adamw(model)
    layers = {name: getattr(model.base_model.model, name) for name in SIZES}
    before = {}

    def components(layer):
        a, b, e = layer.factors("default")
        return a.detach().clone(), b.detach().clone(), e.detach().clone()

    class Watched(Moves):
        def _move(self, number):
            before.update({name: components(layer) for name, layer in layers.items()})
            return super()._move(number)

    scheduler = attach(model, optimizer, total_steps=STEPS, policy=Watched)
    moved = 0
    for step in range(1, STEPS + 1):
        births = [list(module.parameters[-1][2]) for module in scheduler.session.modules]
        train(model, optimizer, goal, step, step)
        for (name, layer), module, old in zip(layers.items(), scheduler.session.modules, births, strict=True):
            new = module.parameters[-1][2]
            if new == old:
                continue
            moved += 1
            a, b, e = components(layer)
            kept = [place for place, birth in enumerate(new) if birth != step]
            was_a, was_b, was_e = before[name]
            rows = {tuple(row) for row in was_a.tolist()}
            assert all(tuple(row) in rows for row in a[kept].tolist())
            stay = [place for place, row in enumerate(was_a.tolist()) if row in a[kept].tolist()]
            wanted = was_b[:, stay] @ torch.diag(was_e[stay, 0]) @ was_a[stay]
            torch.testing.assert_close(b @ torch.diag(e[:, 0]) @ a, wanted)
    assert moved


# The budget.


def test_less_than_a_component_a_module_begins_with_one_and_is_pruned_by_the_middle():
    goal, model = teacher(), adapted(r=0.5)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    spent = []
    train(model, optimizer, goal, look=lambda step: spent.append(scheduler.spent))
    middle = scheduler.schedule.middle
    assert spent[0] == sum(COSTS)
    assert max(spent[middle + scheduler.schedule.deltaT :]) <= scheduler.budget == round(0.5 * sum(COSTS))


def test_a_larger_start_is_pruned_to_the_budget():
    goal, model = teacher(), adapted(r=1, init_r=3)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, goal)
    assert scheduler.spent <= scheduler.budget == sum(COSTS)


def test_a_budget_in_ranks_counts_components():
    goal, model = teacher(), adapted(budget_unit="rank")
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, goal)
    assert scheduler.total_rank == scheduler.budget == 6


def test_no_module_passes_max_r():
    goal, model = teacher(), adapted(max_r=3)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, goal)
    assert max(scheduler.ranks.values()) <= 3


# Going on.


# Between two events, and while it is not known yet whether the trial paid.
@pytest.mark.parametrize("stop", [47, 22])
def test_a_resumed_training_has_the_bits_of_one_that_never_stopped(stop):
    goal = teacher()
    whole = adapted()
    optimizer = adamw(whole)
    attach(whole, optimizer, total_steps=STEPS)
    train(whole, optimizer, goal, 1, stop)
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(whole, optimizer, goal, stop + 1)
    file.seek(0)
    saved = torch.load(file)
    again = adapted()
    again.load_state_dict(saved["model"])
    optimizer = adamw(again)
    scheduler = attach(again, optimizer, total_steps=STEPS)
    optimizer.load_state_dict(saved["optimizer"])
    train(again, optimizer, goal, stop + 1)
    assert scheduler.restored
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_adapter_of_other_ranks_begins_to_be_judged_anew():
    goal, model = teacher(), adapted()
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, goal, 1, 30)
    model.load_state_dict(adapted(rank_pattern={"first": 3, "second": 1}).state_dict())
    # The optimizer's state is of rows that are gone.
    with pytest.warns(UserWarning, match="exp_avg"):
        train(model, optimizer, goal, 31, 31)
    train(model, optimizer, goal, 32)
    assert scheduler.spent <= scheduler.budget


def test_a_run_that_grew_is_not_taken_for_one_that_moves():
    goal = teacher()
    grown = adapted(importance="gradient")
    optimizer = adamw(grown)
    attach(grown, optimizer, total_steps=STEPS)
    train(grown, optimizer, goal, 1, 5)
    saved = optimizer.state_dict()
    model = adapted(init_r=1)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=STEPS)
    with pytest.raises(ValueError, match="importance='gradient'"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"r": 3}, "r=3 makes a budget of 393 parameters.*planned for 262 parameters"),
        ({"tinit": 10}, "tinit=10, but.*planned with 12"),
        ({"deltaT": 9}, "deltaT=9, but.*planned with 5"),
        ({"growth_end": 0.5}, "the last step of growth_end=60, but.*planned with 90"),
    ],
)
def test_another_plan_on_resume_is_told(settings, told):
    goal, model = teacher(), adapted()
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, goal, 1, 10)
    saved = model.state_dict(), optimizer.state_dict()
    again = adapted(**settings)
    again.load_state_dict(saved[0])
    optimizer = adamw(again)
    attach(again, optimizer, total_steps=STEPS)
    with pytest.warns(UserWarning, match=told):
        optimizer.load_state_dict(saved[1])


def test_a_policy_that_lets_ranks_grow_refuses_an_importance_by_which_they_move():
    model = adapted()
    with pytest.raises(ValueError, match=r"importance='fluctuation'.*Growth"):
        attach(model, adamw(model), total_steps=STEPS, policy=Growth)


def test_the_logs_have_the_regulariser():
    model = adapted()
    scheduler = attach(model, adamw(model), total_steps=STEPS)
    assert scheduler.logs() == {"total_rank": 6, "orth_reg": scheduler.orth_reg}


def test_modules_that_end_with_nothing_are_not_in_the_export(tmp_path):
    goal, model = teacher(), adapted(r=1)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, goal)
    nothing = [name for name, rank in scheduler.ranks.items() if not rank]
    scheduler.detach()
    model.eval()
    model.save_pretrained(tmp_path / "ours")
    export_lora(tmp_path / "ours", tmp_path / "lora")
    plain = peft.PeftModel.from_pretrained(Chain(), tmp_path / "lora").eval()
    assert isinstance(plain.peft_config["default"], peft.LoraConfig)
    assert nothing and not any(hasattr(getattr(plain.base_model.model, name), "lora_A") for name in nothing)
    torch.testing.assert_close(plain(batch(1)), model(batch(1)))


@pytest.mark.slow
def test_a_compiled_training_moves_as_the_eager_one():
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = adapted(r=1).double()
        goal, optimizer = teacher().double(), adamw(model)
        called = torch.compile(model) if compiled else model
        scheduler = attach(called, optimizer, total_steps=STEPS)
        for step in range(1, STEPS + 1):
            x = batch(step).double()
            (called(x) - goal(x)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((scheduler.ranks, [p.detach() for p in model.parameters()]))
    (ranks, parameters), (of_compiled, others) = results
    assert ranks == of_compiled
    # A module came to have nothing.
    assert min(ranks.values()) == 0
    torch.testing.assert_close(parameters, others)


# The schedule.


def test_the_schedule_is_a_share_of_the_steps():
    config = IncreLoraConfig(importance="fluctuation")
    assert MoveSchedule.of(config, 300) == MoveSchedule(tinit=30, deltaT=7, end=225)


def test_given_numbers_are_taken():
    config = IncreLoraConfig(importance="fluctuation", tinit=10, deltaT=7, growth_end=0.5)
    schedule = MoveSchedule.of(config, 100)
    assert [step for step in range(1, 101) if schedule.is_event(step)] == [14, 21, 28, 35, 42, 49]


def test_a_training_too_short_for_a_move_is_told():
    with pytest.warns(UserWarning, match="deltaT=40"):
        MoveSchedule.of(IncreLoraConfig(importance="fluctuation", deltaT=40), 50)


def test_steps_that_are_not_known_are_asked_for():
    model = adapted()
    with pytest.raises(ValueError, match="total_steps=None"):
        attach(model, adamw(model))


# The arguments.


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"top_h": 2}, "top_h=2"),
        ({"add_r": 2}, "add_r=2"),
        ({"beta1": 0.9}, "beta1=0.9"),
        ({"beta2": 0.9}, "beta2=0.9"),
        ({"importance_norm": "mean"}, "importance_norm='mean'"),
        ({"importance_window": None}, "importance_window=None"),
        ({"advance_learning": True, "init_lora_weights": "svd"}, "advance_learning=True"),
    ],
)
def test_what_moving_does_not_use_is_refused(settings, name):
    with pytest.raises(ValueError, match=name):
        IncreLoraConfig(importance="fluctuation", **settings)


def test_what_nothing_does_cannot_be_told():
    with pytest.raises(ValueError, match="init_r=0"):
        IncreLoraConfig(init_r=0, importance="fluctuation")


@pytest.mark.parametrize(
    ("importance", "policy"), [("fluctuation", Moves), ("gradient", Growth), ("sensitivity", Growth)]
)
def test_the_importance_says_what_decides(importance, policy):
    model = adapted(importance=importance, growth_end=0.5)
    scheduler = attach(model, adamw(model), total_steps=STEPS)
    assert type(scheduler.policy) is policy


# The arithmetic.


def test_the_choice_follows_what_components_are_worth():
    removed, gained = _core.choose_moves(
        np.array([1.0, 4.0, 9.0, 9.0]),
        np.ones(4, dtype=bool),
        np.ones(4, dtype=bool),
        np.array([2, 2], dtype=np.uint64),
        np.array([9, 9], dtype=np.uint64),
        np.array([1, 1], dtype=np.uint64),
        budget=4,
        most=1,
        margin=3.0,
    )
    assert (removed, gained) == ([0], [0, 1])


# Trainer.


def test_trainer_takes_it_as_it_is(make_bert, tmp_path):
    import transformers

    model = peft.get_peft_model(
        make_bert(), IncreLoraConfig(r=2, importance="fluctuation", target_modules=["query", "value"])
    )
    rows = [{"input_ids": torch.randint(5, 99, (8,)), "labels": torch.tensor(k % 3)} for k in range(40)]
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=60,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    callback = IncreLoraCallback()
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert growth_history(model) is not None
    copy.deepcopy(model)
