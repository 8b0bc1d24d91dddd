"""torch.distributed.checkpoint, its state dicts and files: a resumed training is the uninterrupted one."""

import copy
import io
import json
import math
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from growing import growing
from increlora_rs import IncreLoraConfig, attach, growth_history, load_checkpoint
from increlora_rs.training import checkpoint as saved_state
from increlora_rs.training.modules import adapted_modules
from sizes import resize
from test_distributed import torchrun
from torch import nn
from torch.distributed.checkpoint import state_dict as api
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions

FIXTURES = Path(__file__).parents[1] / "fixtures"
STEPS = 20
# The paper's form keeps components in reserve; a window makes the sketches part of a checkpoint.
KINDS = {"gradient": {"importance_window": 2}, "sensitivity": {}}
OPTIONS = {
    "plain": {},
    "full": {"full_state_dict": True},
    "offloaded": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
    "trained only": {"ignore_frozen_params": True, "strict": False},
}
# Before a growth, at one, within a window after it.
STOPS = [2, 6, 8]


def adapted(kind="gradient", **config):
    torch.manual_seed(3)
    form = IncreLoraConfig.paper if kind == "sensitivity" else growing
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["0", "2"], "tinit": 3, "deltaT": 3, "top_h": 1}
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    return peft.get_peft_model(base, form(**(settings | KINDS[kind] | config)))


def adamw(model, **kwargs):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **kwargs)


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def attached(model, optimizer):
    return attach(model, optimizer, total_steps=STEPS, lr_warmup_steps=2)


def begin(kind="gradient", make=adamw):
    model = adapted(kind)
    optimizer = make(model)
    return model, optimizer, attached(model, optimizer)


def run(model, optimizer, first, last):
    for t in range(first, last):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
        (model(x) - torch.sin(2 * x[:, :4])).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def stopped(kind="gradient", stop=8, make=adamw):
    model, optimizer, scheduler = begin(kind, make)
    run(model, optimizer, 0, stop)
    return model, optimizer, scheduler


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def result(model, scheduler):
    return parameters(model), scheduler.history.tolist(), scheduler.step


def assert_same(one, other):
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys()
    for name in one[0]:
        assert torch.equal(one[0][name], other[0][name]), name


@pytest.fixture(scope="module")
def whole():
    """What an uninterrupted training gives, by kind and optimizer."""
    found = {}

    def get(kind="gradient", make=adamw):
        if (kind, make) not in found:
            model, optimizer, scheduler = begin(kind, make)
            run(model, optimizer, 0, STEPS)
            found[kind, make] = result(model, scheduler)
        return found[kind, make]

    return get


# The state dicts.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_training_resumed_by_state_dicts_is_the_uninterrupted_one(kind, stop, options, order, whole):
    options = StateDictOptions(**OPTIONS[options])
    model, optimizer, _ = stopped(kind, stop)
    file = io.BytesIO()
    torch.save(api.get_state_dict(model, optimizer, options=options), file)
    file.seek(0)
    of_model, of_optimizer = torch.load(file, weights_only=True)

    model, optimizer, scheduler = begin(kind)
    if order == "model first":
        api.set_model_state_dict(model, of_model, options=options)
        api.set_optimizer_state_dict(model, optimizer, of_optimizer, options=options)
    else:
        # Within, the optimizer comes first.
        api.set_state_dict(
            model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options
        )
    run(model, optimizer, stop, STEPS)
    assert_same(result(model, scheduler), whole(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_training_that_goes_back_is_the_uninterrupted_one(kind, order, whole):
    """From where nothing grows any more to where the next growth's window has begun."""
    model, optimizer, scheduler = stopped(kind)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, 8, 15)
    assert scheduler.total_rank == scheduler.budget
    pairs = list(zip((model, optimizer), states, strict=True))
    for one, state in pairs if order == "model first" else pairs[::-1]:
        one.load_state_dict(state)
    run(model, optimizer, 8, STEPS)
    assert_same(result(model, scheduler), whole(kind))


def test_an_optimizer_without_state_of_its_own_resumes_too(whole):
    model, optimizer, _ = stopped(make=sgd)
    of_model, of_optimizer = api.get_state_dict(model, optimizer)
    model, optimizer, scheduler = begin(make=sgd)
    api.set_model_state_dict(model, of_model)
    api.set_optimizer_state_dict(model, optimizer, of_optimizer)
    run(model, optimizer, 8, STEPS)
    assert_same(result(model, scheduler), whole(make=sgd))


def test_looks_at_an_optimizer_without_state_change_nothing(whole):
    model, optimizer, scheduler = begin(make=sgd)
    for t in range(STEPS):
        api.get_optimizer_state_dict(model, optimizer)
        run(model, optimizer, t, t + 1)
    assert_same(result(model, scheduler), whole(make=sgd))


def test_keys_of_a_fresh_state_are_those_of_a_grown_one():
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    fresh = api.get_optimizer_state_dict(*begin()[:2], options=options)
    grown = api.get_optimizer_state_dict(*stopped()[:2], options=options)
    assert fresh.keys() == grown.keys()


def test_a_look_at_a_fresh_optimizer_counts_as_no_step():
    model, optimizer, scheduler = begin()
    api.get_optimizer_state_dict(model, optimizer)
    assert scheduler.step == 0


def test_a_training_after_a_look_at_the_fresh_state_is_the_one_resumed_from_it():
    model, optimizer, scheduler = begin()
    states = api.get_state_dict(model, optimizer)
    file = io.BytesIO()
    torch.save(states, file)
    run(model, optimizer, 0, STEPS)
    looked = result(model, scheduler)

    file.seek(0)
    of_model, of_optimizer = torch.load(file, weights_only=True)
    model, optimizer, scheduler = begin()
    api.set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
    run(model, optimizer, 0, STEPS)
    assert_same(result(model, scheduler), looked)


def test_a_look_at_the_fresh_state_leaves_new_rows_their_own_bias_correction():
    def trained(first_look):
        model = adapted()
        optimizer = adamw(model)
        if first_look == "before attach":
            api.get_optimizer_state_dict(model, optimizer)
        scheduler = attached(model, optimizer)
        if first_look == "after attach":
            api.get_optimizer_state_dict(model, optimizer)
        run(model, optimizer, 0, STEPS)
        return result(model, scheduler)

    assert_same(trained("before attach"), trained("after attach"))


def test_a_state_without_a_schedulers_is_announced():
    model = adapted()
    optimizer = adamw(model)
    run(model, optimizer, 0, 2)
    state = api.get_optimizer_state_dict(model, optimizer)
    model, optimizer, _ = begin()
    with pytest.warns(UserWarning, match="holds none of a scheduler"):
        api.set_optimizer_state_dict(model, optimizer, state)


# Earlier states.


def from_version(version, kind):
    """A fresh training with the model of a checkpoint that an earlier release made after 7 or 8 steps, and
    that checkpoint's optimizer state."""
    saved = torch.load(FIXTURES / f"optimizer_v{version}_{kind}.pt", weights_only=True)
    model, optimizer, scheduler = begin(kind)
    for module in adapted_modules(model, "default"):
        a, b, e = saved["adapter"][module.name]
        resize(module.layer, e.shape[0], a.shape[0])
        with torch.no_grad():
            for parameter, value in zip(module.factors, (a, b, e), strict=True):
                parameter.copy_(value)
    return model, optimizer, scheduler, saved["optimizer"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [1, 2])
def test_a_state_of_an_earlier_version_goes_on_to_the_budget_without_a_warning(version, kind):
    model, optimizer, scheduler, state = from_version(version, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(state)
        assert scheduler.restored
        assert scheduler.step in (7, 8)
        run(model, optimizer, scheduler.step, STEPS)
    assert scheduler.total_rank == scheduler.budget


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [1, 2])
def test_a_state_of_an_earlier_version_and_the_same_one_saved_anew_go_on_alike(version, kind):
    results = []
    for anew in (False, True):
        model, optimizer, scheduler, state = from_version(version, kind)
        optimizer.load_state_dict(state)
        if anew:
            state = optimizer.state_dict()
            model, optimizer, scheduler, _ = from_version(version, kind)
            optimizer.load_state_dict(state)
        run(model, optimizer, scheduler.step, STEPS)
        results.append(result(model, scheduler))
    assert_same(*results)


def test_scores_and_history_of_an_earlier_version_are_those_that_it_saved():
    _, optimizer, scheduler, state = from_version(2, "gradient")
    saved = json.loads(state["param_groups"][0][saved_state.KEY])
    optimizer.load_state_dict(state)
    assert list(scheduler.scores.values()) == saved["scores"]["sigma"]
    assert scheduler.history.tolist() == [
        (step, saved["modules"][k], rank, score) for step, k, rank, score in saved["history"]
    ]


def without(name, state):
    group = state["param_groups"][0]
    saved = json.loads(group[saved_state.KEY])
    del saved[name]
    group[saved_state.KEY] = json.dumps(saved)


def test_a_state_without_all_scores_gives_the_ranks_and_the_scores_of_those_that_grew():
    model, optimizer, scheduler, state = from_version(2, "gradient")
    without("growth", state)
    optimizer.load_state_dict(state)
    history = growth_history(model)
    assert (history.first_ranks, history.steps, history.ranks) == ([1, 1], [6], [[1, 2]])
    unknown, score = history.scores[0]
    assert math.isnan(unknown)
    assert score == scheduler.history["importance"][0]


def test_a_state_that_names_no_importance_is_one_of_the_sensitivity():
    _, optimizer, scheduler, state = from_version(2, "sensitivity")
    without("importance", state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(state)
    assert all(scheduler.scores.values())


# Checkpoints on disk.


class App:
    """Model and optimizer as one Stateful, as torch's tutorial has it."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self):
        model, optimizer = api.get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state):
        raise NotImplementedError


def flat_state(model, optimizer):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return api.get_optimizer_state_dict(model, optimizer, options=options)


def trained_state(model):
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    return api.get_model_state_dict(model, options=options)


LAYOUTS = {
    "two keys": lambda m, o: dict(zip(("model", "optim"), api.get_state_dict(m, o), strict=True)),
    "trained weights only": lambda m, o: {
        "model": trained_state(m),
        "optim": api.get_optimizer_state_dict(m, o),
    },
    "one Stateful": lambda m, o: {"app": App(m, o)},
    "flat below a key": lambda m, o: {"model": trained_state(m), "optim": flat_state(m, o)},
    "flat at the top": lambda m, o: trained_state(m) | flat_state(m, o),
    "the objects themselves": lambda m, o: {"model": m, "optimizer": o},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ["attach first", "load first"])
def test_a_training_resumed_from_a_checkpoint_is_the_uninterrupted_one(kind, layout, order, whole, tmp_path):
    model, optimizer, _ = stopped(kind)
    dcp.save(LAYOUTS[layout](model, optimizer), checkpoint_id=tmp_path)
    model = adapted(kind)
    optimizer = adamw(model)
    if order == "attach first":
        scheduler = attached(model, optimizer)
    load_checkpoint(model, tmp_path, optimizer)
    if order == "load first":
        scheduler = attached(model, optimizer)
    run(model, optimizer, 8, STEPS)
    assert_same(result(model, scheduler), whole(kind))


def saved_model(path):
    model, _, scheduler = stopped(stop=STEPS)
    dcp.save({"model": api.get_model_state_dict(model)}, checkpoint_id=path)
    return model, scheduler


@pytest.mark.parametrize("as_given", [str, Path, dcp.FileSystemReader])
def test_a_fresh_model_takes_ranks_and_weights_of_a_grown_one(as_given, tmp_path):
    model, scheduler = saved_model(tmp_path)
    fresh = adapted()
    load_checkpoint(fresh, as_given(tmp_path))
    assert {m.name: m.rank for m in adapted_modules(fresh, "default")} == scheduler.ranks
    assert_same((parameters(fresh),), (parameters(model),))


def test_frozen_weights_in_the_checkpoint_are_loaded(tmp_path):
    model, _ = saved_model(tmp_path)
    fresh = adapted()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    load_checkpoint(fresh, tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_model_is_loaded(wrap, tmp_path):
    model, _ = saved_model(tmp_path)
    fresh = adapted()
    load_checkpoint(wrap(fresh), tmp_path)
    assert_same((parameters(fresh),), (parameters(model),))


def test_a_checkpoint_by_async_save_is_loaded(tmp_path, group_of_one):
    model, optimizer, _ = stopped(stop=STEPS)
    dcp.async_save(LAYOUTS["two keys"](model, optimizer), checkpoint_id=tmp_path / "saved").result()
    fresh = adapted()
    load_checkpoint(fresh, tmp_path / "saved")
    assert_same((parameters(fresh),), (parameters(model),))


def test_a_checkpoint_turned_into_one_file_resumes(whole, tmp_path):
    model, optimizer, _ = stopped()
    dcp.save(LAYOUTS["two keys"](model, optimizer), checkpoint_id=tmp_path / "saved")
    dcp_to_torch_save(tmp_path / "saved", tmp_path / "one.pt")
    state = torch.load(tmp_path / "one.pt", weights_only=True)
    model, optimizer, scheduler = begin()
    api.set_model_state_dict(model, state["model"])
    api.set_optimizer_state_dict(model, optimizer, state["optim"])
    run(model, optimizer, 8, STEPS)
    assert_same(result(model, scheduler), whole())


def test_a_module_that_no_step_used_resumes(tmp_path):
    model, optimizer, _ = begin()
    unused = adapted_modules(model, "default")[0]
    for parameter in unused.factors:
        parameter.requires_grad_(False)
    run(model, optimizer, 0, 2)
    for parameter in unused.factors:
        parameter.requires_grad_(True)
    dcp.save(LAYOUTS["flat at the top"](model, optimizer), checkpoint_id=tmp_path)
    model, optimizer, scheduler = begin()
    load_checkpoint(model, tmp_path, optimizer)
    run(model, optimizer, 2, STEPS)
    assert scheduler.total_rank == scheduler.budget


def test_a_checkpoint_without_a_schedulers_state_is_announced(tmp_path):
    model = adapted()
    optimizer = adamw(model)
    run(model, optimizer, 0, 2)
    dcp.save(LAYOUTS["flat at the top"](model, optimizer), checkpoint_id=tmp_path)
    model, optimizer, _ = begin()
    with pytest.warns(UserWarning, match="holds none of a scheduler"):
        load_checkpoint(model, tmp_path, optimizer)


# What is refused.


def test_a_directory_without_a_checkpoint_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint of torch"):
        load_checkpoint(adapted(), tmp_path)


def test_a_damaged_file_is_an_exception_with_its_name(tmp_path):
    saved_model(tmp_path)
    for file in tmp_path.glob("*.distcp"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=f"checkpoint: {re.escape(str(tmp_path))} cannot be read"):
        load_checkpoint(adapted(), tmp_path)


def test_damaged_metadata_are_told(tmp_path):
    saved_model(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint: the metadata of "):
        load_checkpoint(adapted(), tmp_path)


@pytest.mark.parametrize(
    ("targets", "told"), [(["0"], "are not in the model"), (["0", "2", "extra"], "has no '.*extra")]
)
def test_a_checkpoint_of_other_modules_is_refused_and_the_model_stays(targets, told, tmp_path):
    saved_model(tmp_path)
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    base.extra = nn.Linear(4, 4)
    model = peft.get_peft_model(base, growing(r=3, lora_alpha=6, target_modules=targets))
    before = parameters(model)
    with pytest.raises(ValueError, match=f"checkpoint: .*{told}"):
        load_checkpoint(model, tmp_path)
    assert_same((parameters(model),), (before,))


def test_a_checkpoint_of_a_wider_model_is_refused(tmp_path):
    saved_model(tmp_path)
    base = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))
    model = peft.get_peft_model(base, growing(r=3, lora_alpha=6, target_modules=["0", "2"]))
    with pytest.raises(ValueError, match="load it into the model that was trained"):
        load_checkpoint(model, tmp_path)


def test_a_checkpoint_without_an_optimizers_state_is_refused_where_one_is_wanted(tmp_path):
    saved_model(tmp_path)
    model = adapted()
    with pytest.raises(ValueError, match="holds 0 optimizers' states"):
        load_checkpoint(model, tmp_path, adamw(model))


def test_a_checkpoint_with_the_model_twice_is_refused(tmp_path):
    state = api.get_model_state_dict(stopped()[0])
    dcp.save({"model": state, "average": state}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="holds the model 2 times"):
        load_checkpoint(adapted(), tmp_path)


def test_a_model_without_an_adapter_is_refused(tmp_path):
    saved_model(tmp_path)
    with pytest.raises(ValueError, match="model: it has no adapter of increlora_rs"):
        load_checkpoint(nn.Linear(2, 2), tmp_path)


# Several processes.


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Directory with the checkpoint and the results of two processes."""
    out = tmp_path_factory.mktemp("processes")
    torchrun(2, "checkpoint.py", out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("way", ["load_checkpoint", "broadcast"])
def test_two_processes_resume_bit_for_bit(two_processes, way):
    for rank in range(2):
        found = torch.load(two_processes / f"rank{rank}.pt")
        assert_same((found[way],), (found["whole"],))


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_loaded_by_one(two_processes):
    model = adapted()
    load_checkpoint(model, two_processes / "dcp")
    assert_same((parameters(model),), (torch.load(two_processes / "rank0.pt")["saved"],))
