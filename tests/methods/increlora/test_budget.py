"""budget_unit="parameters": spent to the last component that fits, by score for each parameter, and told in
its unit wherever a budget is told."""

import itertools
import json
import logging
import re
from functools import partial

import numpy as np
import peft
import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, attach, export_lora, growth_history, module_table, rank_table
from increlora_rs.methods.increlora.growth import Growth
from increlora_rs.reports.plots import draw_growth, draw_ranks
from torch import nn

WIDTHS = (8, 40, 40, 8, 6)
COSTS = [n + m + 1 for n, m in itertools.pairwise(WIDTHS)]
TARGETS = [f"maps.{i}" for i in range(4)]
R = 3
TOTAL = R * sum(COSTS)


class Chain(nn.Module):
    """Linear maps with tanh between them, of the given widths."""

    def __init__(self, widths=WIDTHS):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(widths))

    def forward(self, x):
        for layer in self.maps[:-1]:
            x = torch.tanh(layer(x))
        return self.maps[-1](x)


def adapted(make=growing, seed=3, **kwargs):
    torch.manual_seed(seed)
    options = {"r": R, "lora_alpha": 8, "target_modules": TARGETS, "budget_unit": "parameters"} | kwargs
    return peft.get_peft_model(Chain(), make(**options))


def train(model, optimizer, first, last):
    for t in range(first, last + 1):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(12, WIDTHS[0], generator=generator)
        nn.functional.mse_loss(model(x), torch.sin(3 * x[:, : WIDTHS[-1]])).backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def trained(steps=100, **kwargs):
    model = adapted(**kwargs)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=steps)
    train(model, optimizer, 1, steps)
    return model, scheduler


def test_the_budget_is_what_rank_r_everywhere_trains():
    model = adapted()
    assert attach(model, adamw(model), total_steps=100).budget == TOTAL
    lora = peft.get_peft_model(Chain(), peft.LoraConfig(r=R, target_modules=TARGETS))
    # LoRA has no E, of which there are r a module here.
    assert lora.get_nb_trainable_parameters()[0] == TOTAL - R * len(TARGETS)


@pytest.mark.parametrize("make", [growing, IncreLoraConfig.paper])
@pytest.mark.parametrize("importance", ["sensitivity", "gradient"])
@pytest.mark.parametrize("steps", [5, 40, 200])
def test_the_budget_is_spent_to_the_last_component_that_fits(make, importance, steps):
    # At the first step B is 0, and with it every sensitivity: not where ranks may grow that early.
    late = {"growth_end": 0.6} if importance == "sensitivity" else {}
    _, scheduler = trained(steps, make=make, importance=importance, **late)
    ranks = list(scheduler.ranks.values())
    left = scheduler.budget - scheduler.spent
    assert scheduler.spent == sum(c * r for c, r in zip(COSTS, ranks, strict=True))
    assert left >= 0
    open_ = [c for c, r, most in zip(COSTS, ranks, (8, 40, 8, 6), strict=True) if r < most]
    assert all(cost > left for cost in open_)


def test_the_budget_is_never_exceeded_on_the_way():
    _, scheduler = trained(200)
    ranks = dict.fromkeys(TARGETS, 1)
    for row in scheduler.history:
        ranks[str(row["module"])] = int(row["rank"])
        assert sum(c * r for c, r in zip(COSTS, ranks.values(), strict=True)) <= TOTAL
    assert ranks == scheduler.ranks


def test_the_trained_numbers_are_the_ones_counted():
    model, scheduler = trained()
    scheduler.detach()
    assert model.get_nb_trainable_parameters()[0] == scheduler.spent


@pytest.mark.parametrize(("given", "end"), [({}, 40), ({"growth_end": 0.6}, 240)])
def test_growth_is_over_at_growth_end(given, end):
    model = adapted(**given)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=400)
    train(model, optimizer, 1, end)
    before = scheduler.ranks
    train(model, optimizer, end + 1, 400)
    assert scheduler.ranks == before
    assert scheduler.budget - scheduler.spent < min(COSTS)


def chosen_by(scores):
    return partial(Growth, choose_by=lambda _: scores)


@pytest.mark.filterwarnings("ignore:the budget may not be reached")
def test_ranks_differ_from_those_of_a_budget_in_rank_by_the_cost():
    # Equal scores: the cheapest module and then the first of the next, where in rank the first two grow.
    model = adapted(tinit=4, deltaT=5, top_h=2)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100, policy=chosen_by(np.ones(4)))
    train(model, optimizer, 1, 5)
    assert list(scheduler.ranks.values()) == [2, 1, 1, 2]
    model = adapted(tinit=4, deltaT=5, top_h=2, budget_unit="rank")
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100, policy=chosen_by(np.ones(4)))
    train(model, optimizer, 1, 5)
    assert list(scheduler.ranks.values()) == [2, 2, 1, 1]


@pytest.mark.filterwarnings("ignore:the budget may not be reached")
def test_a_score_that_outweighs_its_cost_still_grows():
    model = adapted(tinit=4, deltaT=5, top_h=1)
    optimizer = adamw(model)
    scores = np.array([0.0, 81.0, 1.0, 0.1]) * 1.1
    scheduler = attach(model, optimizer, total_steps=100, policy=chosen_by(scores))
    train(model, optimizer, 1, 5)
    assert list(scheduler.ranks.values()) == [1, 2, 1, 1]


def test_a_budget_in_rank_is_as_ever():
    model, scheduler = trained(budget_unit="rank")
    assert scheduler.total_rank == scheduler.budget == scheduler.spent == 4 * R
    assert growth_history(model).costs is None
    assert rank_table(model).parameters is None


def test_max_r_that_leaves_budget_is_told_in_parameters():
    # The last module has rank 6 at most, so that 8 everywhere cannot be.
    model = adapted(max_r=8, r=8)
    optimizer = adamw(model)
    most = 8 * (sum(COSTS) - COSTS[3]) + 6 * COSTS[3]
    with pytest.warns(UserWarning, match=f"the budget cannot be reached: .* allow {most}"):
        scheduler = attach(model, optimizer, total_steps=100)
    with pytest.warns(
        UserWarning, match=f"rank is 30, {most} of a budget of {8 * sum(COSTS)} parameters: every"
    ):
        train(model, optimizer, 1, 100)
    assert list(scheduler.ranks.values()) == [8, 8, 8, 6]


def test_a_schedule_that_falls_short_says_so_in_parameters():
    model = adapted(tinit=0, deltaT=50, top_h=1)
    start = sum(COSTS)
    message = (
        rf"4 modules at an average rank of r=3 make {TOTAL} parameters, but from {start} only "
        rf"{start + 2 * min(COSTS)} are sure to be reached in 100 steps"
    )
    with pytest.warns(UserWarning, match=message):
        attach(model, adamw(model), total_steps=100)


def test_ranks_past_the_budget_are_told_in_parameters():
    model = adapted(rank_pattern={"maps.1": 20})
    start = sum(COSTS) + 19 * COSTS[1]
    with pytest.warns(UserWarning, match=f"add up to {start} parameters already, .* budget of {TOTAL} that"):
        attach(model, adamw(model), total_steps=100)


@pytest.mark.filterwarnings("ignore:the budget may not be reached")
def test_a_growth_is_logged_in_both_units(caplog):
    model = adapted(tinit=4, deltaT=5, top_h=1)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, total_steps=100)
    with caplog.at_level(logging.INFO, "increlora_rs"):
        train(model, optimizer, 1, 5)
    spent = scheduler.spent
    assert caplog.messages == [f"step 5: 1 modules grew, total rank 5, {spent} of {TOTAL} parameters"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    model, scheduler = trained()
    words = f"{scheduler.total_rank}, {scheduler.spent} of a budget of {TOTAL} parameters"
    scheduler.detach()
    model.save_pretrained(folder)
    return folder, scheduler, words


def test_tables_and_the_card_tell_the_unit(saved):
    folder, scheduler, words = saved
    for table in (rank_table(folder), module_table(folder)):
        assert f"ranks, total {words}" in " ".join(str(table).split())
    assert f"total {words}" in (folder / "README.md").read_text()
    assert rank_table(folder).parameters == scheduler.spent


def test_the_share_of_a_module_is_that_of_its_parameters(saved):
    folder, scheduler, _ = saved
    shares = re.findall(r"([\d.]+)%", str(module_table(folder)))
    want = [100 * c * r / TOTAL for c, r in zip(COSTS, scheduler.ranks.values(), strict=True)]
    assert shares == [f"{share:.1f}" for share in [*want, 100 * scheduler.spent / TOTAL]]


def test_pictures_tell_the_unit(saved):
    folder, scheduler, words = saved
    short = words.replace("a budget of ", "")
    assert draw_ranks(rank_table(folder)).axes[0].get_title() == f"ranks, total {short}"
    history = growth_history(folder)
    assert (history.budget, history.costs) == (TOTAL, COSTS)
    total = next(axes for axes in draw_growth(history).axes if axes.get_title())
    assert total.get_title() == f"growth of the ranks, total {short}"
    assert total.get_ylabel() == "parameters"
    assert total.patches[0].get_data().values[-1] == scheduler.spent


def test_a_history_whose_costs_are_of_other_modules_is_refused(saved, tmp_path):
    folder, _, _ = saved
    for name in ("adapter_config.json", "adapter_model.safetensors", "increlora_history.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    file = tmp_path / "increlora_history.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"costs": [1]}))
    with pytest.raises(ValueError, match="is not a history of ranks"):
        growth_history(tmp_path)


def test_the_export_is_a_plain_lora_as_ever(saved, tmp_path):
    folder, _, _ = saved
    export_lora(folder, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_resumed_training_is_the_uninterrupted_one():
    def run(stop):
        model = adapted()
        optimizer = adamw(model)
        scheduler = attach(model, optimizer, total_steps=60)
        train(model, optimizer, 1, 20)
        if stop:
            states = model.state_dict(), optimizer.state_dict()
            model = adapted(seed=4)
            model.load_state_dict(states[0])
            optimizer = adamw(model)
            scheduler = attach(model, optimizer, total_steps=60)
            optimizer.load_state_dict(states[1])
        train(model, optimizer, 21, 60)
        assert growth_history(model).costs == COSTS
        return scheduler.history.tolist(), [p.detach() for p in model.parameters()]

    (first, parameters), (second, others) = run(False), run(True)
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_another_unit_on_resume_is_told():
    model = adapted(budget_unit="rank")
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=60)
    train(model, optimizer, 1, 5)
    states = model.state_dict(), optimizer.state_dict()
    model = adapted()
    model.load_state_dict(states[0])
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=60)
    with pytest.warns(UserWarning, match=f"a budget of {TOTAL} parameters, .* was planned for 12: "):
        optimizer.load_state_dict(states[1])


def test_a_weighted_sum_of_adapters_counts_in_rank(saved):
    folder, _, _ = saved
    model = peft.PeftModel.from_pretrained(Chain(), folder)
    model.add_weighted_adapter(["default"], [2.0], "sum", combination_type="cat")
    assert model.peft_config["sum"].budget_unit == "rank"


def test_costs_are_of_a_row_a_column_and_a_number():
    config = growing(r=5, budget_unit="parameters")
    budget = config.budget([(3, 4), (10, 2)], ())
    assert (budget.costs, budget.total) == ([8, 13], 105)
    assert budget.spent([1, 2]) == 34
    assert str(budget) == "105 parameters"
