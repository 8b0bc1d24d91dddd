"""An adapter in the capacity form that fully_shard (FSDP2) cuts with its block trains as one process with the
averaged loss; what cannot be is refused by name."""

import sys

import increlora_rs
import pytest
import torch
from capacity_ends import assert_bit_for_bit, assert_resumed, assert_same
from increlora_rs import attach
from launches import WORKERS, torchrun
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

sys.path.insert(0, str(WORKERS))

import capacity
import sharded_adapter as worker

slow = pytest.mark.slow
CASES = [(way, scenario) for way in worker.WAYS for scenario in worker.scenarios(way)]


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory):
    """(number, results of every process) of one launch for all ways."""
    out = tmp_path_factory.mktemp("sharded_adapter")
    return request.param, torchrun(request.param, "sharded_adapter.py", out, timeout=1200)


@slow
@pytest.mark.parametrize(("way", "scenario"), CASES)
def test_all_processes_are_alike_and_equal_one_with_the_averaged_loss(processes, way, scenario):
    number, results = processes
    first, *others = (result[way][scenario] for result in results)
    for other in others:
        assert_bit_for_bit(other, first)
    if way not in worker.ROUNDED:
        assert_same(worker.train_alone(scenario, way, number), first)


@slow
@pytest.mark.parametrize(("way", "scenario"), [case for case in CASES if case[0] in worker.RESUMED])
def test_a_checkpoint_after_a_growth_goes_on_bit_for_bit(processes, way, scenario):
    _, results = processes
    assert_resumed(results[0][way][scenario], worker.STOP)


@slow
@pytest.mark.parametrize("scenario", worker.FROM_FILES)
def test_what_one_process_saved_after_all_gathered_it_goes_on_bit_for_bit(processes, scenario):
    _, results = processes
    whole = results[0]["plain"][scenario]
    assert_bit_for_bit(whole["from files"], whole)


@slow
def test_two_copies_of_two_pieces_equal_one_process(tmp_path):
    first, *others = torchrun(4, "sharded_adapter.py", tmp_path, "replicas")
    for scenario in worker.scenarios("replicas"):
        whole = first["replicas"][scenario]
        assert_same(worker.train_alone(scenario, "replicas", 4), whole)
        assert whole["history"][0][0] <= worker.STOP
        assert_bit_for_bit(whole["resumed"], whole)
        for other in others:
            assert_bit_for_bit(other["replicas"][scenario], whole)


def fully_sharded(model, **options):
    mesh = init_device_mesh("cpu", (1,))
    for block in model.base_model.model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def attached(model):
    optimizer = torch.optim.AdamW(capacity.trained(model), lr=1e-2)
    return attach(model, optimizer, total_steps=capacity.STEPS)


def test_an_adapter_that_changes_its_size_is_refused_with_both_ways_out(group_of_one):
    model = fully_sharded(capacity.model_for("growing", "resize"))
    with pytest.raises(ValueError, match=r"is sharded \(FSDP\).* ignored_params=.* growth=\"capacity\""):
        attached(model)


def test_one_that_is_cut_in_part_or_otherwise_than_by_rows_is_refused_by_name(group_of_one):
    model = capacity.model_for("growing")
    ignored = {p for p in model.base_model.model.first.parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="shards 12 parameters of the adapter and leaves 3 whole"):
        attached(fully_sharded(model, ignored_params=ignored))
    model = fully_sharded(capacity.model_for("growing"), shard_placement_fn=lambda p: Shard(p.dim() - 1))
    with pytest.raises(ValueError, match=r"only what .* has cut by rows can be trained"):
        attached(model)


def test_an_optimizer_of_the_parameters_before_they_were_cut_is_refused(group_of_one):
    model = capacity.model_for("growing")
    optimizer = torch.optim.AdamW(capacity.trained(model), lr=1e-2)
    with pytest.raises(ValueError, match="does not hold the adapter's parameters"):
        attach(fully_sharded(model), optimizer, total_steps=capacity.STEPS)


@pytest.mark.parametrize("gathered", [False, True])
def test_a_save_without_a_gathered_state_is_refused_with_the_way_out(group_of_one, tmp_path, gathered):
    model = fully_sharded(capacity.model_for("growing"))
    scheduler = attached(model)
    for module in (model, *model.base_model.model.blocks) if gathered else ():
        module.unshard()
    with pytest.raises(ValueError, match="get_model_state_dict"):
        model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="get_model_state_dict"):
        model.save_pretrained(tmp_path / "adapter", state_dict=model.state_dict())
    state = get_model_state_dict(model, options=worker.FULL)
    model.save_pretrained(tmp_path / "adapter", state_dict=state)
    saved = increlora_rs.rank_table(tmp_path / "adapter")
    assert saved.total_rank == scheduler.total_rank


def test_numbers_of_a_part_are_refused_with_the_way_out(group_of_one):
    model = fully_sharded(capacity.model_for("growing"))
    with pytest.raises(ValueError, match="is sharded over processes, and this one has a part of it"):
        model.base_model.model.first.get_delta_weight("default")


def test_a_loaded_adapter_of_other_ranks_is_cut_as_the_one_before(group_of_one):
    whole = capacity.model_for("growing")
    capacity.train(whole, *begun_of(whole), 0, capacity.STEPS)
    state = {key: value.clone() for key, value in whole.state_dict().items() if "lora_" in key}
    model = fully_sharded(capacity.model_for("growing"))
    model.load_state_dict(state, strict=False)
    loaded = get_model_state_dict(model, options=worker.FULL)
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def begun_of(model):
    optimizer = torch.optim.AdamW(capacity.trained(model), lr=1e-2)
    return optimizer, attach(model, optimizer, total_steps=capacity.STEPS)


@slow
def test_a_distributed_checkpoint_loads_into_three_processes_and_into_one_whole_model(tmp_path):
    saved = torchrun(2, "sharded_adapter_checkpoint.py", tmp_path, "save")[0]
    for loaded in torchrun(3, "sharded_adapter_checkpoint.py", tmp_path, "load"):
        for scenario, want in saved.items():
            assert_bit_for_bit(loaded[scenario], want)
            assert loaded[scenario]["ranks"] == want["ranks"]
            assert all(map(torch.equal, loaded[scenario]["moments"], want["moments"]))
    for scenario, want in saved.items():
        model = capacity.model_for(scenario)
        optimizer, scheduler = begun_of(model)
        increlora_rs.load_checkpoint(model, tmp_path / scenario, optimizer)
        assert scheduler.ranks == want["ranks"]
        loaded = model.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in want["adapter"].items())
