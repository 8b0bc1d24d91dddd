"""Several processes choose alike, stay identical bit for bit, and equal one process with the mean loss."""

import gc
import sys

import pytest
import torch
from increlora_rs.resizing import ddp as buckets
from launches import WORKERS, torchrun

sys.path.insert(0, str(WORKERS))

import ddp

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[1, 2, 3])
def processes(request, tmp_path_factory):
    """(number, results of every process) of one launch for all scenarios."""
    out = tmp_path_factory.mktemp("ddp")
    return request.param, torchrun(request.param, "ddp.py", out)


@pytest.mark.parametrize("scenario", ddp.SCENARIOS)
def test_all_processes_have_the_same_parameters_bit_for_bit(processes, scenario):
    number, results = processes
    if number == 1:
        pytest.skip("one process has none to differ from")
    first = results[0][scenario]["parameters"]
    for other in results[1:]:
        for name, parameter in first.items():
            assert torch.equal(parameter, other[scenario]["parameters"][name]), name


@pytest.mark.parametrize("scenario", ddp.SCENARIOS)
def test_all_processes_choose_alike_and_meet_the_budget(processes, scenario):
    _, results = processes
    histories = [result[scenario]["history"] for result in results]
    assert all(history == histories[0] for history in histories)
    assert sum(results[0][scenario]["ranks"].values()) == 9


@pytest.mark.parametrize("scenario", ddp.SCENARIOS)
def test_several_processes_equal_one_with_the_averaged_loss(processes, scenario):
    number, results = processes
    alone = ddp.train_alone(scenario, number)
    assert alone["ranks"] == results[0][scenario]["ranks"]
    for name, parameter in alone["parameters"].items():
        together = results[0][scenario]["parameters"][name]
        assert (together - parameter).norm() < 1e-9 * parameter.norm(), name


@pytest.mark.parametrize("scenario", ddp.SCENARIOS)
def test_all_processes_are_told_of_a_growth_alike_and_have_the_same_average(processes, scenario):
    _, results = processes
    first = results[0][scenario]
    assert sorted({step for step, _ in first["events"]}) == sorted({row[0] for row in first["history"]})
    for other in (result[scenario] for result in results[1:]):
        assert other["events"] == first["events"]
        for name, mean in first["average"].items():
            assert torch.equal(mean, other["average"][name]), name


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """Results of two processes under Trainer."""
    out = tmp_path_factory.mktemp("trainer")
    return torchrun(2, "trainer.py", out)


@pytest.mark.parametrize("form", ["growing", "paper"])
def test_trainer_in_two_processes_meets_the_budget_with_equal_parameters(trainers, form):
    first, second = (result[form, "whole"] for result in trainers)
    assert first["total_rank"] == 12
    assert first["history"] == second["history"]
    for name, parameter in first["parameters"].items():
        assert torch.equal(parameter, second["parameters"][name]), name


@pytest.mark.parametrize("form", ["growing", "paper"])
def test_trainer_in_two_processes_resumes_bit_for_bit(trainers, form):
    whole, resumed = trainers[0][form, "whole"], trainers[0][form, "resumed"]
    assert resumed["history"] == whole["history"]
    for name, parameter in whole["parameters"].items():
        assert torch.equal(parameter, resumed["parameters"][name]), name


def test_a_sharded_model_is_refused_before_the_first_step(trainers):
    assert "FSDP" in trainers[0]["sharded"]
    assert "ignored_params=increlora_rs.adapter_parameters(model)" in trainers[0]["sharded"]


def test_a_model_that_is_wrapped_after_the_first_look_is_found(group_of_one):
    model = torch.nn.Linear(2, 2)
    assert buckets.find_ddps(model) == []
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    assert buckets.find_ddps(model) == [ddp]


def test_what_was_found_is_not_looked_for_again(group_of_one, monkeypatch):
    model = torch.nn.Linear(2, 2)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    assert buckets.find_ddps(model) == [ddp]
    monkeypatch.setattr(buckets.gc, "get_objects", None)
    assert buckets.find_ddps(model) == [ddp]


def test_a_wrapper_that_is_gone_is_not_found(group_of_one):
    model = torch.nn.Linear(2, 2)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    assert buckets.find_ddps(model) == [ddp]
    del ddp
    gc.collect()
    assert buckets.find_ddps(model) == []


def test_a_module_that_one_process_calls_is_reached_in_all(tmp_path):
    first, second = torchrun(2, "unreached.py", tmp_path)
    assert first == second
    for ranks, told in first.values():
        assert "['none']" in told[0]
        assert ranks["none"] == 1
        assert ranks["some"] > 1
        assert sum(ranks.values()) == 9


def test_an_earlier_adapter_loaded_in_the_middle_leaves_all_processes_equal(tmp_path):
    (first, ranks), (second, others) = torchrun(2, "reload.py", tmp_path)
    assert ranks == others
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
