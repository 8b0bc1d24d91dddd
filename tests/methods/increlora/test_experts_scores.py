"""Scores of experts: of the steps in which tokens came to them, so one that is seen rarely gets ranks."""

import pytest
import torch
from increlora_rs import IncreLoraConfig, attach
from increlora_rs.layers.found import adapted_layers
from increlora_rs.support.names import short
from peft import get_peft_model
from torch import nn

EXPERTS, OUT, IN = 8, 12, 10
IMPORTANCES = pytest.mark.parametrize("importance", ["fluctuation", "gradient", "sensitivity"])


class Experts(nn.Module):
    """Row t of x goes to expert ``chosen[t]``."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.w = nn.Parameter(torch.randn(EXPERTS, OUT, IN, generator=generator) / IN**0.5)

    def forward(self, x, chosen):
        return torch.einsum("toi,ti->to", self.w[chosen], x)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x, chosen):
        return self.experts(x, chosen)


def mixture(**config):
    torch.manual_seed(0)
    return get_peft_model(
        Mixture(), IncreLoraConfig(**({"target_modules": [], "target_parameters": ["w"]} | config))
    )


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def ranks_of(model):
    return [layer.rank("default") for layer in adapted_layers(model, "default").values()]


# One of them is seen in a quarter of the steps, and needs rank.
RARE = 5


def batch(number):
    generator = torch.Generator().manual_seed(1000 + number)
    chosen = torch.randint(EXPERTS, (48,), generator=generator)
    if number % 4:
        chosen[chosen == RARE] = 0
    return torch.randn(48, IN, generator=generator), chosen


def planted():
    """A model in which every expert has something to learn of rank 1, and the rare one more, of rank 6."""
    generator = torch.Generator().manual_seed(1)
    teacher = Mixture()
    for number in range(EXPERTS):
        rank, size = (6, 1.0) if number == RARE else (1, 0.3)
        u, v = torch.randn(OUT, rank, generator=generator), torch.randn(rank, IN, generator=generator)
        teacher.experts.w.data[number] += size * u @ v / IN**0.5
    return teacher


@IMPORTANCES
def test_an_expert_that_is_seen_rarely_and_needs_rank_gets_it(importance):
    teacher = planted()
    # Ranks that move need the time until what came is judged.
    steps = 400 if importance == "fluctuation" else 160
    growing = {"r": 2, "lora_alpha": 8, "budget_unit": "rank", "growth_end": 0.6}
    settings = {"r": 3, "lora_alpha": 16} if importance == "fluctuation" else growing
    model = mixture(importance=importance, **settings)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    scheduler = attach(model, optimizer, total_steps=steps)
    for number in range(steps):
        x, chosen = batch(number)
        (model(x, chosen) - teacher(x, chosen)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks = ranks_of(model)
    assert ranks[RARE] >= 5
    assert sorted(ranks)[-2] < ranks[RARE]
    assert sum(ranks) <= settings["r"] * EXPERTS
    assert list(scheduler.ranks) == [f"experts.w.{number}" for number in range(EXPERTS)]


def scored(importance, numbers):
    """The policy of a training that moves nothing, after batches of these numbers; 0 is of others alone."""
    growing = {} if importance == "fluctuation" else {"init_r": 2, "budget_unit": "rank"}
    if importance == "sensitivity":
        growing["importance_window"] = None
    model = mixture(
        r=3, importance=importance, init_lora_weights=False, tinit=90, deltaT=10, growth_end=1.0, **growing
    )
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    if importance == "gradient":
        # In the window before the first growth.
        numbers = [0] * (90 - len(numbers)) + numbers
    scheduler = attach(model, optimizer, total_steps=100)
    for number in numbers:
        x = torch.randn(64, IN, generator=torch.Generator().manual_seed(number))
        chosen = torch.arange(64) % EXPERTS
        if number == 0:
            chosen = 1 + torch.arange(64) % (EXPERTS - 1)
        model(x, chosen).square().mean().backward()
        if importance == "gradient" and scheduler.step == 89:
            # Before it chooses, which drops what it chose by.
            with torch.no_grad():
                scheduler.session._prepare(optimizer)
            return scheduler.session.policy
        optimizer.step()
        optimizer.zero_grad()
    return scheduler.session.policy


def of_first_expert(policy, importance):
    if importance == "fluctuation":
        return torch.stack([policy._mean[:3], policy._squares[:3], policy._steps[:3]])
    if importance == "sensitivity":
        smoothing = policy._scores.smoothing
        return torch.stack([smoothing.mean[:1], smoothing.uncertainty[:1]])
    return torch.tensor(policy._scores.at_growth()[:1])


@IMPORTANCES
def test_a_step_in_which_no_token_came_to_an_expert_is_no_step_to_it(importance):
    seen = scored(importance, [1, 2, 3, 4])
    with_others = scored(importance, [1, 0, 0, 2, 3, 0, 4])
    wanted, found = (of_first_expert(policy, importance) for policy in (seen, with_others))
    assert wanted.all()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0.0)


def test_an_expert_that_was_hardly_seen_is_not_judged():
    policy = scored("fluctuation", [0] * 20 + [1, 2, 3, 4])
    seen = policy._seen_enough()
    assert seen.tolist() == [False] * 3 + [True] * 3 * (EXPERTS - 1)
    assert scored("fluctuation", [0] * 20 + [1, 2, 3, 4, 5])._seen_enough().all()


def test_an_expert_that_is_never_seen_keeps_what_it_began_with():
    model = mixture(r=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    attach(model, optimizer, total_steps=100)
    for number in range(100):
        generator = torch.Generator().manual_seed(number)
        x, chosen = torch.randn(64, IN, generator=generator), 1 + torch.arange(64) % (EXPERTS - 1)
        (model(x, chosen) - x[:, :1].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ranks_of(model)[0] == 2


def test_modules_without_components_get_them_by_the_gradient_of_the_expert():
    model = mixture(r=0.5, init_r=0, importance="gradient", budget_unit="rank")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    attach(model, optimizer, total_steps=40)
    assert ranks_of(model) == [0] * EXPERTS
    for number in range(40):
        x, chosen = batch(4 * number)
        (model(x, chosen) - 3.0 * (chosen == RARE)[:, None] * x[:, :1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks = ranks_of(model)
    assert sum(ranks) == EXPERTS // 2
    assert ranks[RARE] >= 1


def test_names_of_history_are_those_of_experts():
    policy = scored("sensitivity", [1])
    assert [short(module.name) for module in policy.modules[:2]] == ["experts.w.0", "experts.w.1"]
