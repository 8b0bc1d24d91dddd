"""A base that fully_shard (FSDP2) shards over the processes, and an adapter that is left whole and grows."""

import sys

import pytest
import torch
from increlora_rs import adapter_parameters, attach, load_checkpoint
from launches import WORKERS, torchrun
from torch import nn

sys.path.insert(0, str(WORKERS))

import sharded

slow = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory):
    """(number, results of every process) of one launch for all scenarios."""
    out = tmp_path_factory.mktemp("sharded")
    return request.param, torchrun(request.param, "sharded.py", out)


@slow
@pytest.mark.parametrize("scenario", sharded.SCENARIOS)
def test_all_processes_are_alike_bit_for_bit(processes, scenario):
    _, results = processes
    first, *others = (result[scenario] for result in results)
    assert first["history"]
    for other in others:
        assert other["history"] == first["history"]
        for one, parameter in zip(other["parameters"], first["parameters"], strict=True):
            assert torch.equal(one, parameter)


@slow
@pytest.mark.parametrize("scenario", [name for name in sharded.SCENARIOS if name not in sharded.ROUNDED])
def test_the_result_is_that_of_one_process_with_the_averaged_loss(processes, scenario):
    number, results = processes
    whole, alone = results[0][scenario], sharded.train_alone(scenario, number)
    assert whole["ranks"] == alone["ranks"]
    assert [row[:3] for row in whole["history"]] == [row[:3] for row in alone["history"]]
    for one, parameter in zip(whole["parameters"], alone["parameters"], strict=True):
        assert (one - parameter).norm() <= 1e-5 * parameter.norm()


@slow
@pytest.mark.parametrize("scenario", sharded.RESUMED)
def test_a_training_that_one_process_saved_after_a_growth_goes_on_bit_for_bit(processes, scenario):
    _, results = processes
    whole, resumed = results[0][scenario], results[0][scenario]["resumed"]
    steps = [row[0] for row in whole["history"]]
    assert steps[0] <= sharded.STOP < steps[-1]
    assert resumed["history"] == whole["history"]
    for one, parameter in zip(resumed["parameters"], whole["parameters"], strict=True):
        assert torch.equal(one, parameter)


@slow
def test_trainer_with_a_sharded_base_ends_as_under_ddp_and_resumes_bit_for_bit(tmp_path):
    first, second = torchrun(2, "trainer_sharded.py", tmp_path, "ddp", "fsdp", "state in shards")
    ours, like = first["fsdp"], first["ddp"]
    assert ours["sharded"] > like["sharded"] == 0
    assert [row[:3] for row in ours["history"]] == [row[:3] for row in like["history"]]
    of_all = zip(ours["parameters"], like["parameters"], second["fsdp"]["parameters"], strict=True)
    for one, parameter, other in of_all:
        assert (one - parameter).norm() <= 1e-4 * parameter.norm()
        assert torch.equal(one, other)
    # A checkpoint of the middle goes on, whatever ranks the model begins with.
    for way, resumed in first["resumed"].items():
        assert resumed["history"] == second["resumed"][way]["history"] == ours["history"], way
        pairs = zip(resumed["parameters"], ours["parameters"], strict=True)
        assert all(torch.equal(one, parameter) for one, parameter in pairs), way


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What two processes saved after a growth, and where."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, torchrun(2, "sharded_checkpoint.py", folder, "save")[0]


@slow
def test_a_distributed_checkpoint_of_a_sharded_base_loads_into_three_processes(checkpoint):
    folder, saved = checkpoint
    for loaded in torchrun(3, "sharded_checkpoint.py", folder, "load"):
        assert loaded["ranks"] == saved["ranks"]
        assert loaded["history"] == saved["history"]
        assert all(map(torch.equal, loaded["parameters"], saved["parameters"]))
        assert all(map(torch.equal, loaded["moments"], saved["moments"]))


@slow
def test_a_distributed_checkpoint_of_a_sharded_base_loads_into_one_whole_model(checkpoint):
    folder, saved = checkpoint
    model = sharded.model_for("plain")
    optimizer = sharded.optimizer_of(model)
    scheduler = attach(model, optimizer, total_steps=sharded.STEPS)
    load_checkpoint(model, folder / "checkpoint", optimizer)
    assert scheduler.ranks == saved["ranks"]
    assert all(map(torch.equal, sharded.trained(model), saved["parameters"]))


def test_what_has_to_stay_whole_is_the_adapter_and_what_else_is_trained():
    model = sharded.model_for("with a head")
    names = {id(p): name for name, p in model.named_parameters()}
    left_out = {names[id(p)] for p in adapter_parameters(model)}
    assert left_out == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in left_out)


def test_a_model_without_an_adapter_is_refused_by_name():
    with pytest.raises(ValueError, match="a Linear without an adapter"):
        adapter_parameters(nn.Linear(2, 2))
