"""DeepSpeed's engine: an adapter in the capacity form, by the stages of ZeRO."""

import copy
import importlib.util
import sys

import pytest
import torch
from capacity_ends import assert_bit_for_bit, assert_resumed, assert_same, assert_same_average
from flat_zero import DeepSpeedZeroOptimizer
from increlora_rs import attach, keep_average
from launches import WORKERS, torchrun
from zero_stages import ENGINES

sys.path.insert(0, str(WORKERS))

import capacity

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: `make test-deepspeed` has it",
)
slow = pytest.mark.slow


# All of them in two processes; in three, into which nothing divides evenly, one of each way to lay out.
OF_THREE = ("ZeRO 1", "ZeRO 3")
LAUNCHES = {2: tuple(ENGINES), 3: OF_THREE}
CASES = [
    (number, name, scenario)
    for number, names in LAUNCHES.items()
    for name in names
    for scenario in ENGINES[name][1]
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """``launched(number)``: the results of so many processes, of one launch for all their stages."""
    known = {}

    def run(number):
        if number not in known:
            out = tmp_path_factory.mktemp("zero")
            known[number] = torchrun(number, "zero.py", out, *LAUNCHES[number], timeout=1200)
        return known[number]

    return run


@slow
@needs_deepspeed
# Of bfloat16 one process has no like: what it multiplies is rounded.
@pytest.mark.parametrize(
    ("number", "stage", "scenario"), [case for case in CASES if "bfloat16" not in case[1]]
)
def test_an_engine_ends_as_one_process_with_the_averaged_loss(launched, number, stage, scenario):
    assert_same(capacity.train_alone(scenario, number), launched(number)[0][stage][scenario])


@slow
@needs_deepspeed
@pytest.mark.parametrize(("number", "stage", "scenario"), CASES)
def test_all_processes_of_an_engine_are_alike_bit_for_bit(launched, number, stage, scenario):
    first, *others = (result[stage][scenario] for result in launched(number))
    for other in others:
        assert_bit_for_bit(other, first)


@slow
@needs_deepspeed
@pytest.mark.parametrize(("number", "stage", "scenario"), CASES)
def test_its_checkpoint_goes_on_bit_for_bit(launched, number, stage, scenario):
    assert_resumed(launched(number)[0][stage][scenario], capacity.STOP)


@slow
@needs_deepspeed
def test_trainer_ends_as_under_ddp_and_resumes_bit_for_bit(tmp_path):
    (tmp_path / "ddp").mkdir()
    like = torchrun(2, "trainer_sharded.py", tmp_path / "ddp", "ddp")[0]["ddp"]
    (tmp_path / "zero").mkdir()
    first, second = torchrun(2, "trainer_zero.py", tmp_path / "zero", 0, 1, 2, 3)
    for stage, ours in first.items():
        assert ours["engine"] == "DeepSpeedEngine"
        assert [row[:3] for row in ours["history"]] == [row[:3] for row in like["history"]] != []
        assert ours["saved"].keys() == like["saved"].keys()
        for key, value in like["saved"].items():
            assert (value - ours["saved"][key]).norm() <= 1e-4 * value.norm(), (stage, key)
        assert ours["resumed"]["history"] == second[stage]["resumed"]["history"] == ours["history"]
        assert all(torch.equal(value, ours["saved"][key]) for key, value in ours["resumed"]["saved"].items())


def trained_by_zero(scenario, groups=lambda model: [{"params": capacity.trained(model)}]):
    """A model, and what trains it as ZeRO 1 does, in one process."""
    model = capacity.model_for(scenario)
    optimizer = torch.optim.AdamW(groups(model), lr=capacity.optimizer_of(model, scenario).defaults["lr"])
    return model, DeepSpeedZeroOptimizer(optimizer)


def begun(*arguments):
    """Both, and the scheduler."""
    model, zero = trained_by_zero(*arguments)
    return model, zero, attach(model, zero, total_steps=capacity.STEPS)


def train(model, zero, scheduler, last):
    for t in range(scheduler.step + 1, last + 1):
        capacity.loss_of(model, t, 0, 0).backward()
        capacity.clip(model)
        zero.step()


@pytest.mark.parametrize("scenario", capacity.SCENARIOS)
def test_in_flat_parameters_it_ends_as_the_growing_form(scenario, group_of_one):
    model, zero, scheduler = begun(scenario)
    train(model, zero, scheduler, capacity.STEPS)
    scheduler.detach()
    assert_same(capacity.train_alone(scenario, 1), capacity.result(model, scheduler))


@pytest.mark.parametrize("first", ["attach", "load"])
@pytest.mark.parametrize("scenario", capacity.SCENARIOS)
def test_what_the_optimizer_saved_goes_on_in_a_fresh_adapter(scenario, first, group_of_one):
    model, zero, scheduler = begun(scenario)
    train(model, zero, scheduler, capacity.STOP)
    saved = copy.deepcopy(zero.state_dict())
    train(model, zero, scheduler, capacity.STEPS)
    scheduler.detach()
    other, zero = trained_by_zero(scenario)
    if first == "load":
        zero.load_state_dict(saved)
    resumed = attach(other, zero, total_steps=capacity.STEPS)
    if first == "attach":
        zero.load_state_dict(saved)
    train(other, zero, resumed, capacity.STEPS)
    resumed.detach()
    assert_bit_for_bit(capacity.result(model, scheduler), capacity.result(other, resumed))


def test_a_head_in_a_group_of_its_own_is_trained_beside_the_adapter(group_of_one):
    def groups(model):
        model.base_model.model.head.requires_grad_(True)
        head = set(model.base_model.model.head.parameters())
        return [{"params": list(head)}, {"params": [p for p in capacity.trained(model) if p not in head]}]

    model, zero, scheduler = begun("growing", groups)
    before = model.base_model.model.head.weight.detach().clone()
    train(model, zero, scheduler, capacity.STEPS)
    scheduler.detach()
    assert not torch.equal(before, model.base_model.model.head.weight)
    assert scheduler.step == capacity.STEPS
    assert scheduler.total_rank == scheduler.budget


def test_an_adapter_in_several_groups_is_refused_by_name(group_of_one):
    def groups(model):
        own = capacity.trained(model)
        return [{"params": own[:3]}, {"params": own[3:]}]

    with pytest.raises(ValueError, match=r"in 2 of ZeRO's flat parameters.*one group"):
        begun("growing", groups)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("dtype", torch.float16, 'float16.*"bf16"'),
        ("elastic_checkpoint", True, "leave elastic_checkpoint out"),
        ("cpu_offload", True, "leave offload_optimizer out"),
    ],
)
def test_what_cannot_work_is_refused_by_name(name, value, told, group_of_one):
    model = capacity.model_for("growing")
    zero = DeepSpeedZeroOptimizer(torch.optim.AdamW(capacity.trained(model)))
    setattr(zero, name, value)
    with pytest.raises(ValueError, match=told):
        attach(model, zero, total_steps=capacity.STEPS)


@pytest.mark.parametrize("scenario", ["growing", "moving", "paper"])
def test_an_average_of_the_models_own_copies_is_that_of_the_growing_form(scenario, group_of_one):
    model, zero, scheduler = begun(scenario)
    average = capacity.Average(scheduler, model)
    for t in range(1, capacity.STEPS + 1):
        train(model, zero, scheduler, t)
        average.update()
    scheduler.detach()
    alone = capacity.train_alone(scenario, 1)
    assert_same_average(alone, capacity.result(model, scheduler, average))


def test_an_average_of_what_stage_3_has_taken_away_is_refused_by_name(group_of_one):
    model, _, scheduler = begun("growing")
    with pytest.raises(NotImplementedError, match=r"deepspeed.zero.GatheredParameters"):
        keep_average(scheduler, [torch.empty(0) for _ in capacity.trained(model)])


def test_an_adapter_that_changes_its_size_is_refused_with_the_way_out(group_of_one):
    model = capacity.model_for("growing", "resize")
    zero = DeepSpeedZeroOptimizer(torch.optim.AdamW(capacity.trained(model)))
    with pytest.raises(ValueError, match='Set growth="capacity"'):
        attach(model, zero, total_steps=capacity.STEPS)
    model = capacity.model_for("growing")
    optimizer = torch.optim.AdamW(capacity.trained(model))
    DeepSpeedZeroOptimizer(optimizer)
    with pytest.raises(ValueError, match="give attach the engine"):
        attach(model, optimizer, total_steps=capacity.STEPS)
