"""Modules that no gradient reaches: named once, and given nothing while others have room."""

import copy
import re
import warnings

import numpy as np
import pytest
import torch
from growing import growing
from increlora_rs import attach
from increlora_rs._core import Schedule
from increlora_rs.methods.increlora.unreached import choose
from peft import get_peft_model
from torch import nn
from torch.nn.functional import linear
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

IMPORTANCES = ["gradient", "sensitivity"]


class Net(nn.Module):
    """``read`` is not called, for something reads its weight; ``last`` is, if ``uses_last(step)``."""

    def __init__(self, uses_last=lambda step: True):
        super().__init__()
        self.first, self.read, self.last = (nn.Linear(12, 12) for _ in range(3))
        self.uses_last, self.step = uses_last, 0

    def forward(self, x):
        y = torch.tanh(linear(torch.tanh(self.first(x)), self.read.weight, self.read.bias))
        return self.last(y) if self.uses_last(self.step) else y


def trained(
    net=None, targets=("first", "read", "last"), steps=20, micro=1, set_to_none=True, backend=None, **kwargs
):
    """(scheduler, the warnings that name modules) of a training."""
    torch.manual_seed(0)
    net = Net() if net is None else net
    model = get_peft_model(net, growing(**({"r": 4, "target_modules": list(targets)} | kwargs)))
    call = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = attach(model, optimizer, total_steps=steps)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for net.step in range(1, steps + 1):
            for _ in range(micro):
                call(torch.randn(8, 12)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    return scheduler, [str(one.message) for one in told if "no gradient" in str(one.message)]


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("steps", [1, 20, 150])
def test_a_module_that_is_not_called_gets_no_rank_and_the_budget_is_met(importance, steps):
    scheduler, _ = trained(importance=importance, steps=steps)
    assert scheduler.ranks["read"] == 1
    assert scheduler.total_rank == scheduler.budget == 12


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_first_growth_names_it_and_no_later_one(importance):
    scheduler, told = trained(importance=importance, steps=150, growth_end=0.5)
    assert len(np.unique(scheduler.history["step"])) > 1
    (message,) = told
    first = scheduler.history["step"][0]
    assert message.startswith(f"step {first}: no gradient has reached 1 of 3 adapted modules, ['read']: ")


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_compiled_graph_tells_the_same(importance):
    torch._dynamo.reset()
    scheduler, told = trained(importance=importance, backend="aot_eager")
    assert scheduler.ranks["read"] == 1
    assert len(told) == 1
    assert "['read']" in told[0]


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_gradients_that_are_set_to_zero_are_none(importance):
    scheduler, told = trained(importance=importance, micro=2, set_to_none=False)
    assert scheduler.ranks["read"] == 1
    assert "['read']" in told[0]


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("init", [True, "svd", False])
def test_modules_that_are_called_are_not_named_whatever_they_start_from(importance, init):
    _, told = trained(targets=["first", "last"], importance=importance, init_lora_weights=init)
    assert not told


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_regulariser_alone_is_no_gradient(importance):
    scheduler, told = trained(importance=importance, init_lora_weights="svd", orth_reg_weight=0.5)
    assert scheduler.ranks["read"] == 1
    assert "['read']" in told[0]


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("uses_last", [lambda step: step == 1, lambda step: step == 2], ids=["early", "late"])
def test_a_module_of_one_step_of_the_window_is_as_any_other(importance, uses_last):
    # The first growth is that of step 2; by the sensitivity the update of a fresh module counts 0.
    scheduler, told = trained(Net(uses_last), importance=importance)
    assert scheduler.history["step"][0] == 2
    assert "['read']" in told[0]


@pytest.mark.filterwarnings("ignore:.*importance of every module is 0")
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_at_the_first_step_only_what_has_no_gradient_is_named(importance):
    with pytest.warns(UserWarning, match=r"of 3 adapted modules, \['read'\]"):
        torch.manual_seed(0)
        model = get_peft_model(
            Net(),
            growing(r=2, target_modules=["first", "read", "last"], importance=importance, tinit=0, deltaT=1),
        )
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        scheduler = attach(model, optimizer, total_steps=20)
        model(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()
    assert scheduler.ranks["read"] == 1


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_where_the_others_are_full_the_budget_is_met_all_the_same(importance):
    scheduler, _ = trained(importance=importance, r=4, max_r=5)
    assert scheduler.ranks == {"first": 5, "read": 2, "last": 5}


def test_a_budget_in_parameters_goes_to_the_others_too():
    scheduler, _ = trained(budget_unit="parameters")
    assert scheduler.ranks["read"] == 1
    assert scheduler.spent == scheduler.budget


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 12), nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return linear(self.embed(x.abs().mul(5).long().clamp(max=19)), self.embed.weight)


def test_a_tied_head_that_is_read_under_the_other_name_is_named():
    scheduler, told = trained(Tied(), targets=["embed", "head"])
    assert "['head']" in told[0]
    assert scheduler.ranks["head"] == 1


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_an_embedding_that_is_called_is_not_named(importance):
    _, told = trained(Tied(), targets=["embed"], importance=importance, steps=3)
    assert not told


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.head(self.encoder(x).detach())


def test_an_encoder_that_the_loss_does_not_reach_is_named():
    scheduler, told = trained(Cut(), targets=["encoder", "head"])
    assert "['encoder']" in told[0]
    assert scheduler.ranks["encoder"] == 1


# Told when the adapter is made, of x_proj too.
@pytest.mark.filterwarnings("ignore:.*with kernels of its own:UserWarning")
@pytest.mark.parametrize(
    ("config", "build"), [(MambaConfig, MambaForCausalLM), (FalconMambaConfig, FalconMambaForCausalLM)]
)
def test_the_dt_proj_of_mamba_is_named(config, build):
    torch.manual_seed(0)
    base = build(config(vocab_size=30, hidden_size=16, state_size=4, num_hidden_layers=2))
    targets = ["in_proj", "x_proj", "dt_proj"]
    model = get_peft_model(base, growing(r=2, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    scheduler = attach(model, optimizer, total_steps=4)
    ids = torch.randint(0, 30, (2, 5))
    with pytest.warns(UserWarning, match=r"no gradient has reached 2 of 6 .*layers.0.mixer.dt_proj"):
        for _ in range(4):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert {rank for name, rank in scheduler.ranks.items() if name.endswith("dt_proj")} == {1}
    assert scheduler.total_rank == scheduler.budget


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_resumed_training_gives_the_same_ranks(importance):
    config = growing(r=4, target_modules=["first", "read", "last"], importance=importance)

    def make(state=None):
        torch.manual_seed(0)
        model = get_peft_model(Net(lambda step: step < 15), config)
        if state is not None:
            model.load_state_dict(state[0])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if state is not None:
            optimizer.load_state_dict(state[1])
        return model, optimizer, attach(model, optimizer, total_steps=200)

    def run(model, optimizer, steps):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no gradient has reached")
            for step in steps:
                model.base_model.model.step = step
                torch.manual_seed(step)
                model(torch.randn(8, 12)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()

    model, optimizer, whole = make()
    run(model, optimizer, range(1, 19))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, range(19, 31))
    twin, other, resumed = make(state)
    run(twin, other, range(19, 31))
    assert resumed.history.tolist() == whole.history.tolist()
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name


def test_many_modules_are_named_in_part():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(12, 12)
            self.unused = nn.ModuleList(nn.Linear(12, 12) for _ in range(11))

        def forward(self, x):
            return self.used(x)

    targets = ["used", *(f"unused.{i}" for i in range(11))]
    _, told = trained(Deep(), targets=targets, r=1, init_r=1, top_h=1, tinit=0, deltaT=1)
    assert not told, "a budget that is met at the start grows nothing"
    _, told = trained(Deep(), targets=targets, r=2)
    assert re.search(r"11 of 12 .*'unused\.7'\] and 3 more: ", told[0])


def schedule(ranks, caps, budget, **kwargs):
    arrays = np.array(ranks, dtype=np.uint64), np.array(caps, dtype=np.uint64)
    return Schedule(100, *arrays, budget, tinit=1, deltaT=1, **kwargs), *arrays


def test_the_event_hands_out_as_much_as_it_would_have():
    plan, ranks, caps = schedule([1, 1, 1, 1], [9, 9, 9, 9], 20, top_h=4, add_r=2)
    scores = np.array([0.0, 3.0, 0.0, 2.0])
    chosen = choose(plan, scores, ranks, caps, 20, np.array([False, True, False, True]))
    assert chosen == [(1, 4), (3, 4)]


def test_the_best_takes_what_does_not_go_up_evenly():
    plan, ranks, caps = schedule([1, 1, 1], [9, 9, 9], 20, top_h=3, add_r=1)
    chosen = choose(plan, np.array([0.0, 1.0, 2.0]), ranks, caps, 20, np.array([False, True, True]))
    assert chosen == [(2, 2), (1, 1)]


def test_a_module_without_a_gradient_takes_what_the_others_have_no_room_for():
    plan, ranks, caps = schedule([1, 1], [9, 2], 20, top_h=2, add_r=3)
    chosen = choose(plan, np.array([0.0, 1.0]), ranks, caps, 20, np.array([False, True]))
    assert chosen == [(1, 1), (0, 3)]


def test_a_module_without_a_gradient_that_comes_first_does_not_win_a_tie():
    plan, ranks, caps = schedule([1, 1], [9, 9], 20, top_h=1, add_r=1)
    assert choose(plan, np.zeros(2), ranks, caps, 20, np.array([False, True])) == [(1, 1)]


@pytest.mark.parametrize("reached", [True, False])
def test_modules_that_are_all_alike_are_chosen_as_ever(reached):
    plan, ranks, caps = schedule([1, 1], [9, 9], 20, top_h=2, add_r=1)
    scores = np.array([1.0, 2.0])
    alike = np.full(2, reached)
    assert choose(plan, scores, ranks, caps, 20, alike) == plan.choose(scores, ranks, caps, 20)
