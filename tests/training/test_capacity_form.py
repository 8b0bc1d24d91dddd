"""The capacity form: parameters of a fixed size, of which the rank says how many rows count."""

import copy
import sys

import peft
import pytest
import torch
from capacity_ends import assert_bit_for_bit, assert_resumed, assert_same, assert_same_average
from diffusers.training_utils import EMAModel
from increlora_rs import keep_average
from launches import WORKERS, torchrun
from torch._dynamo.testing import CompileCounter

sys.path.insert(0, str(WORKERS))

import capacity

slow = pytest.mark.slow


@pytest.mark.parametrize("scenario", capacity.SCENARIOS)
def test_it_ends_as_the_growing_form(scenario):
    grown, ours = capacity.train_alone(scenario, 1), capacity.train_alone(scenario, 1, "capacity")
    assert_same(grown, ours)
    assert_same_average(grown, ours)


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory):
    """(number, results of every process) of one launch for all engines."""
    out = tmp_path_factory.mktemp("capacity")
    return request.param, torchrun(request.param, "capacity.py", out)


@slow
@pytest.mark.parametrize("engine", capacity.ENGINES)
@pytest.mark.parametrize("scenario", capacity.SCENARIOS)
def test_under_an_engine_it_ends_as_one_process_with_the_averaged_loss(processes, engine, scenario):
    number, results = processes
    first, *others = (result[engine][scenario] for result in results)
    alone = capacity.train_alone(scenario, number)
    assert_same(alone, first)
    if engine == "DDP":
        assert_same_average(alone, first)
    for other in others:
        assert_bit_for_bit(other, first)


@slow
@pytest.mark.parametrize("scenario", capacity.SCENARIOS)
@pytest.mark.parametrize("engine", capacity.RESUMED)
def test_a_checkpoint_after_a_growth_goes_on_bit_for_bit(processes, engine, scenario):
    _, results = processes
    assert_resumed(results[0][engine][scenario], capacity.STOP)


@pytest.mark.parametrize("scenario", ["growing", "moving", "paper"])
def test_rows_that_do_not_count_are_zero_and_not_saved(scenario):
    model = capacity.model_for(scenario)
    optimizer = torch.optim.AdamW(capacity.trained(model), lr=1e-2, weight_decay=0.1)
    scheduler = capacity.attach(model, optimizer, total_steps=capacity.STEPS)
    capacity.train(model, optimizer, scheduler, 0, capacity.STOP + 3)
    saved = model.state_dict()
    dead = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        dim = 1 if "lora_B" in name else 0
        rows = saved[name].shape[dim]
        for value in (parameter, *(optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq"))):
            rest = value.narrow(dim, rows, value.shape[dim] - rows)
            assert not rest.any()
            dead += rest.numel()
    assert dead > 0
    scheduler.detach()


@pytest.mark.parametrize("growth", ["resize", "capacity"])
def test_a_saved_adapter_loads_into_either_form(growth, tmp_path):
    model = capacity.model_for("growing")
    optimizer = torch.optim.AdamW(capacity.trained(model), lr=1e-2)
    scheduler = capacity.attach(model, optimizer, total_steps=capacity.STEPS)
    capacity.train(model, optimizer, scheduler, 0, capacity.STEPS)
    scheduler.detach()
    model.save_pretrained(tmp_path)
    other = capacity.model_for("growing", growth)
    other.load_adapter(tmp_path, "default")
    x = torch.randn(3, 9)
    assert torch.equal(model(x), other(x))
    assert len(set(scheduler.ranks.values())) > 1


def test_an_adapter_without_room_for_the_ranks_of_another_refuses_it_by_name(tmp_path):
    big = capacity.model_for("growing", "resize")
    layer = big.base_model.model.blocks[0].up
    layer.structure.grow(layer, "default", 9, torch.Generator().manual_seed(0))
    big.save_pretrained(tmp_path)
    small = capacity.model_for("in parameters")
    with pytest.raises(ValueError, match=r"rank 10 does not fit .* room for 4; raise max_r"):
        small.load_adapter(tmp_path, "default")


def parameters_by_name(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def rows_by_name(model):
    return {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}


@torch.no_grad()
def updated(average, of):
    """``average`` and what ``of`` the model is now, a fifth of the way."""
    pairs = zip(average.values(), of.values(), strict=True)
    return {name: old.lerp(new, 0.2) for name, (old, new) in zip(average, pairs, strict=True)}


class Followed:
    """An average in a dictionary, replaced at each update."""

    def __init__(self, of):
        self.of = of

    def begin(self, scheduler, model):
        self.model, self.tensors = model, self.of(model)
        keep_average(scheduler, lambda: self.tensors)

    def update(self):
        self.tensors = updated(self.tensors, self.of(self.model))


class Shadows(Followed):
    """One in a list, as diffusers' EMAModel has it."""

    def __init__(self):
        self.of = parameters_by_name

    def begin(self, scheduler, model):
        self.model, self.ema = model, EMAModel(capacity.trained(model), decay=0.8, min_decay=0.8)
        keep_average(scheduler, self.ema)

    def update(self):
        self.ema.step(capacity.trained(self.model))

    @property
    def tensors(self):
        return dict(zip(self.of(self.model), self.ema.shadow_params, strict=True))


HOLDERS = {
    "parameters by name": lambda: Followed(parameters_by_name),
    "PEFT's state dict": lambda: Followed(rows_by_name),
    "EMAModel": Shadows,
}


def averaged(growth, scenario, holder):
    """What an average came to, by PEFT's names, and the trained model."""
    model = capacity.model_for(scenario, growth)
    optimizer = capacity.optimizer_of(model, scenario)
    scheduler = capacity.attach(model, optimizer, total_steps=capacity.STEPS)
    average = HOLDERS[holder]()
    average.begin(scheduler, model)
    capacity.train(model, optimizer, scheduler, 0, capacity.STEPS, average)
    scheduler.detach()
    assert scheduler.history.tolist()
    return list(average.tensors.values()), model


@pytest.mark.parametrize("scenario", ["growing", "moving", "paper"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_an_average_of_any_kind_is_that_of_the_growing_form(scenario, holder):
    ours, model = averaged("capacity", scenario, holder)
    wanted, _ = averaged("resize", scenario, holder)
    for one, value in zip(ours, wanted, strict=True):
        if one.shape != value.shape:
            # All that it has room for.
            assert holder != "PEFT's state dict"
            dim = int(one.shape[0] == value.shape[0])
            rest = one.narrow(dim, value.shape[dim], one.shape[dim] - value.shape[dim])
            one = one.narrow(dim, 0, value.shape[dim])
            assert not rest.any()
        torch.testing.assert_close(one, value, rtol=1e-5, atol=1e-6)
    if holder != "PEFT's state dict":
        assert [one.shape for one in ours] == [p.shape for p in capacity.trained(model)]


@pytest.mark.parametrize("scenario", ["growing", "moving"])
def test_an_average_that_is_saved_with_its_training_goes_on_bit_for_bit(scenario):
    def begun():
        model = capacity.model_for(scenario)
        optimizer = capacity.optimizer_of(model, scenario)
        return model, optimizer, capacity.attach(model, optimizer, total_steps=capacity.STEPS)

    model, optimizer, scheduler = begun()
    average = capacity.Average(scheduler, model)
    capacity.train(model, optimizer, scheduler, 0, capacity.STOP, average)
    holders = (model, average.model, optimizer)
    saved = copy.deepcopy([holder.state_dict() for holder in holders])
    capacity.train(model, optimizer, scheduler, 0, capacity.STEPS, average)
    scheduler.detach()
    whole = capacity.result(model, scheduler, average)
    model, optimizer, scheduler = begun()
    average = capacity.Average(scheduler, model)
    for holder, state in zip((model, average.model, optimizer), saved, strict=True):
        holder.load_state_dict(state)
    capacity.train(model, optimizer, scheduler, 0, capacity.STEPS, average)
    scheduler.detach()
    resumed = capacity.result(model, scheduler, average)
    assert_bit_for_bit(resumed, whole)
    assert all(torch.equal(value, resumed["average"][key]) for key, value in whole["average"].items())


def test_room_for_far_more_than_the_budget_is_told():
    config = capacity.config_for("growing")
    with pytest.warns(
        UserWarning, match=r"room for 1,678 numbers, 5 times what r=2 trains.* Set max_r, such as 8"
    ):
        capacity.peft.get_peft_model(capacity.Net(), config)


@pytest.mark.parametrize("scenario", ["growing", "moving"])
def test_a_compiled_model_has_one_graph_of_fixed_shapes(scenario):
    torch._dynamo.reset()
    model, counter = capacity.model_for(scenario), CompileCounter()
    optimizer = torch.optim.AdamW(capacity.trained(model), lr=1e-2)
    scheduler = capacity.attach(model, optimizer, total_steps=capacity.STEPS)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    capacity.train(compiled, optimizer, scheduler, 0, capacity.STEPS)
    scheduler.detach()
    assert counter.frame_count == 1
    eager = capacity.model_for(scenario)
    optimizer = torch.optim.AdamW(capacity.trained(eager), lr=1e-2)
    like = capacity.attach(eager, optimizer, total_steps=capacity.STEPS)
    capacity.train(eager, optimizer, like, 0, capacity.STEPS)
    like.detach()
    assert_same(capacity.result(eager, like), capacity.result(model, scheduler))


@slow
def test_trainer_with_fsdp1_ends_as_under_ddp_and_resumes_bit_for_bit(tmp_path):
    first, second = torchrun(2, "trainer_sharded.py", tmp_path, "ddp", "fsdp1")
    ours, like = first["fsdp1"], first["ddp"]
    assert ours["sharded"] > like["sharded"] == 0
    assert ours["ranks"] == like["ranks"]
    assert [row[:3] for row in ours["history"]] == [row[:3] for row in like["history"]] != []
    assert ours["saved"].keys() == like["saved"].keys()
    # The head is among them.
    assert any("classifier" in key for key in ours["saved"])
    for key, value in like["saved"].items():
        assert (value - ours["saved"][key]).norm() <= 1e-4 * value.norm()
    # A checkpoint of the middle goes on, whatever ranks the model begins with.
    for way, resumed in first["resumed"].items():
        assert resumed["history"] == second["resumed"][way]["history"] == ours["history"], way
        assert all(torch.equal(value, ours["saved"][key]) for key, value in resumed["saved"].items()), way
