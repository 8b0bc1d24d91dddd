"""The capacity form: parameters of a fixed size, of which the rank says how many rows count."""

import sys

import pytest
import torch
from capacity_ends import assert_bit_for_bit, assert_resumed, assert_same
from increlora_rs import keep_average
from launches import WORKERS, torchrun
from torch._dynamo.testing import CompileCounter

sys.path.insert(0, str(WORKERS))

import capacity

slow = pytest.mark.slow


@pytest.mark.parametrize("scenario", capacity.SCENARIOS)
def test_it_ends_as_the_growing_form(scenario):
    assert_same(capacity.train_alone(scenario, 1), capacity.train_alone(scenario, 1, "capacity"))


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
    assert_same(capacity.train_alone(scenario, number), first)
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


def test_what_cannot_train_it_is_refused_by_name():
    model = capacity.model_for("growing")
    optimizer = torch.optim.AdamW(capacity.trained(model), lr=1e-2)
    scheduler = capacity.attach(model, optimizer, total_steps=capacity.STEPS)
    with pytest.raises(NotImplementedError, match="capacity form"):
        keep_average(scheduler, torch.optim.swa_utils.AveragedModel(model))


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
