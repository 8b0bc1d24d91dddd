"""200 steps of training follow the spec's method, written down literally in reference.py."""

import copy

import increlora_rs
import peft
import pytest
import torch
from growing import growing
from increlora_rs.training.modules import adapted_modules
from reference import Module, Reference
from torch import nn

STEPS = 200
WARMUP = 7
LR = 2e-2
NAMES = ["0", "2", "4"]

# With Adam's eps the correction of newborn rows is exact only up to eps.
OPTIMIZERS = {
    "adam": lambda ps: torch.optim.Adam(ps, lr=LR, eps=1e-25),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=LR, eps=1e-25, weight_decay=0.05),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=LR, momentum=0.9, weight_decay=1e-3),
}


def linear(t):
    s = t - 1
    return (s + 1) / WARMUP if s < WARMUP else (STEPS - s) / (STEPS - WARMUP)


def constant(t):
    return 1.0


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 11), nn.Tanh(), nn.Linear(11, 6)).double()


def data(t):
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(16, 9, generator=generator, dtype=torch.float64)
    return x, torch.sin(x[:, :6] * 2) + 0.3 * x[:, 3:]


def reference_of(model, modules, make, multiplier, config, schedule):
    own = []
    for name, module in zip(NAMES, modules, strict=True):
        base = model.base_model.model.get_submodule(name).base_layer
        rank = module.rank
        a, b, e = module.factors[0].detach(), module.factors[1].detach(), module.factors[2].detach()
        own.append(Module(base.weight.detach(), base.bias.detach(), a[:rank], b[:, :rank], e))
    settings = {
        "alpha": config.lora_alpha,
        "r": config.r,
        "scaling": config.scaling,
        "preserve_output": config.preserve_output,
        "orth": config.orthogonality_weight,
        "betas": (config.beta1, config.beta2),
        "restart": config.restart_warmup,
    }
    reference = Reference(
        own,
        lambda p: make([p]),
        lr=LR,
        multiplier=multiplier,
        warmup=WARMUP,
        total=STEPS,
        linear=multiplier is linear,
        config=settings,
        schedule=schedule,
    )
    for k, module in enumerate(modules):
        if module.rows > module.rank:
            reference.add_reserve(0, k, *module.structure.in_reserve(module.layer, module.adapter))
    return reference


def follow(config, optimizer="adam", multiplier=linear):
    """Trains both; after every step scores, choices and ranks agree, at the end all parameters."""
    config = copy.deepcopy(config)
    torch.manual_seed(11)
    model = peft.get_peft_model(network(), config, autocast_adapter_dtype=False).double()
    make = OPTIMIZERS[optimizer]
    trainable = [p for p in model.parameters() if p.requires_grad]
    real = make(trainable)
    rates = torch.optim.lr_scheduler.LambdaLR(real, lambda s: multiplier(s + 1))
    scheduler = increlora_rs.attach(model, real, total_steps=STEPS, lr_warmup_steps=WARMUP)
    modules = adapted_modules(model, "default")
    plan = scheduler.schedule
    schedule = (plan.tinit, plan.deltaT, plan.top_h, plan.add_r)
    reference = reference_of(model, modules, make, multiplier, config, schedule)

    for t in range(1, STEPS + 1):
        x, target = data(t)
        nn.functional.mse_loss(model(x), target).backward()
        real.step()
        real.zero_grad()
        rates.step()
        x, target = data(t)
        for k, gain in reference.step(t, x, target):
            module = modules[k]
            rank = module.rank
            reference.grow(
                t,
                k,
                gain,
                lambda n, m=module, r=rank: (
                    m.factors[0].detach()[r - n : r],
                    m.factors[1].detach()[:, r - n : r],
                    m.factors[2].detach()[r - n : r],
                ),
            )
            if module.rows > rank:
                reference.add_reserve(t, k, *module.structure.in_reserve(module.layer, module.adapter))
        if reference.total_rank == reference.budget:
            reference.drop_reserves()
        assert [m.rank for m in reference.modules] == list(scheduler.ranks.values()), f"step {t}"
        torch.testing.assert_close(
            torch.tensor(list(scheduler.scores.values())), torch.tensor(reference.scores), rtol=1e-6, atol=0.0
        )
    return model, modules, scheduler, reference


def assert_same_parameters(modules, reference):
    for module, own in zip(modules, reference.modules, strict=True):
        for actual, expected in zip(module.factors, own.factors(), strict=True):
            difference = (actual - expected).norm() / expected.norm()
            assert difference < 1e-8


def default(**kwargs):
    """LoRA's initialisation and scale, with the paper's importance and schedule."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": NAMES}
    of_the_paper = {"importance": "sensitivity", "importance_window": None, "growth_end": 0.6}
    return growing(**(settings | of_the_paper | kwargs))


def paper(**kwargs):
    return increlora_rs.IncreLoraConfig.paper(**({"r": 3, "lora_alpha": 6, "target_modules": NAMES} | kwargs))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("form", [default, paper])
@pytest.mark.parametrize("restart", [True, False])
def test_training_follows_the_spec(form, optimizer, restart):
    _, modules, scheduler, reference = follow(form(restart_warmup=restart), optimizer)
    assert_same_parameters(modules, reference)
    assert scheduler.total_rank == scheduler.budget == 9


@pytest.mark.parametrize("advance", [True, False])
@pytest.mark.parametrize("preserve", [True, False])
def test_advance_learning_and_preserve_output_follow_the_spec(advance, preserve):
    config = paper(advance_learning=advance, preserve_output=preserve)
    _, modules, _, reference = follow(config, "adamw")
    assert_same_parameters(modules, reference)


@pytest.mark.parametrize("form", [default, paper])
def test_a_constant_learning_rate_is_followed_after_the_warm_up(form):
    _, modules, _, reference = follow(form(), "adam", constant)
    assert_same_parameters(modules, reference)


@pytest.mark.parametrize("scaling", ["budget", "rank"])
def test_default_init_follows_the_spec_under_either_scaling_with_the_regulariser(scaling):
    _, modules, _, reference = follow(default(scaling=scaling, orth_reg_weight=0.1), "sgd")
    assert_same_parameters(modules, reference)


def test_several_components_an_event_follow_the_spec():
    _, modules, _, reference = follow(paper(add_r=2, top_h=1, tinit=10, deltaT=10), "adam")
    assert_same_parameters(modules, reference)
