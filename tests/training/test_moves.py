"""Components that move between modules while these are trained: whoever holds rows of them follows."""

import copy
import io
import json
import sys

import numpy as np
import peft
import pytest
import torch
from diffusers.training_utils import EMAModel
from increlora_rs import attach, growth_history, keep_average, rank_table
from increlora_rs.contract.policy import Event, Policy
from increlora_rs.methods.increlora.restart import RestartWarmup
from increlora_rs.reports.plots import draw_growth, draw_scores
from launches import WORKERS, torchrun
from moving import MOVES, RANKS, STEPS, Moving, MovingWithReserve, adamw, adapted, backward, train, trainable
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import swa_utils

sys.path.insert(0, str(WORKERS))

import moves

FORMS = {"budget": {}, "rank": {"scaling": "rank"}}
POLICIES = [Moving, MovingWithReserve]
BOTH = pytest.mark.parametrize("policy", POLICIES)


def begin(make_plain, policy=Moving, **config):
    model = adapted(make_plain, **config)
    optimizer = adamw(model)
    return model, optimizer, attach(model, optimizer, policy=policy)


def values(model):
    return [p.detach().clone() for p in trainable(model)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Ranks, births, history, configuration.


def test_ranks_fall_and_rise_and_the_history_has_both(make_plain):
    model, optimizer, scheduler = begin(make_plain)
    train(model, optimizer, 1, STEPS)
    assert list(scheduler.ranks.values()) == RANKS[10]
    history = growth_history(model)
    assert dict(zip(history.steps, history.ranks, strict=True)) == RANKS
    rows = [tuple(row)[:3] for row in scheduler.history.tolist()]
    assert rows[:3] == [(3, "lin0", 2), (3, "lin1", 4), (5, "lin0", 3)]


def test_births_follow_the_rows(make_plain):
    model, optimizer, scheduler = begin(make_plain)
    seen = {}
    for number in range(1, STEPS + 1):
        train(model, optimizer, number, number)
        seen[number] = [copy.copy(module.births[0]) for module in scheduler.session.modules]
    assert [seen[number] for number in MOVES] == [
        [[0, 0], [0, 0, 0, 3]],
        [[0, 0, 5], [0, 0, 3]],
        [[0, 0, 5], [0, 3, 8]],
        [[0, 5], [0, 3, 8, 10]],
    ]


def test_a_component_out_of_the_reserve_is_born_twice_and_those_that_stay_keep_both_births(make_plain):
    model, optimizer, scheduler = begin(make_plain, MovingWithReserve)
    train(model, optimizer, 1, 5)
    # After step 3 lin1 has the reserve of the start as its fourth, and lost its first at step 5.
    a, _, e = scheduler.session.modules[1].births
    assert (a, e) == ([0, 0, 0, 3], [0, 0, 3])


def test_the_configuration_has_the_ranks_and_a_saved_adapter_loads(make_plain, plain_input, tmp_path):
    model, optimizer, scheduler = begin(make_plain)
    train(model, optimizer, 1, STEPS)
    scheduler.detach()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_plain(), tmp_path)
    assert torch.equal(loaded(plain_input), model.eval()(plain_input))
    assert rank_table(tmp_path).total_rank == sum(RANKS[10])
    assert growth_history(tmp_path).ranks == list(RANKS.values())
    assert json.loads((tmp_path / "increlora_history.json").read_text())["growths"][0]["ranks"] == RANKS[3]


def test_pictures_show_what_fell(make_plain):
    model, optimizer, _ = begin(make_plain)
    train(model, optimizer, 1, STEPS)
    draw_growth(growth_history(model))
    axes = draw_scores(growth_history(model)).axes[0]
    assert "a black one: it lost rank" in axes.get_title()
    # The heat map, where modules grew, where they lost.
    assert [len(dots.get_offsets()) for dots in axes.collections[1:]] == [3, 3]


class Warmed(Moving):
    def __init__(self, modules, config, plan):
        super().__init__(modules, config, plan)
        self.warmup = RestartWarmup(plan, enabled=True)

    def before_step(self, step):
        self.warmup.keep_old()

    def after_step(self, step):
        self.warmup.correct(step)
        return super().after_step(step)

    def resized(self):
        self.warmup.find_young(self.modules)


def test_newborn_rows_warm_up_where_they_stand(make_plain):
    model = adapted(make_plain)
    optimizer = adamw(model)
    scheduler = attach(model, optimizer, lr_warmup_steps=4, lr_schedule="follow", policy=Warmed)
    train(model, optimizer, 1, 8)
    a = scheduler.session.modules[1].factors[0]
    before = a.detach().clone()
    train(model, optimizer, 9, 9)
    # Rows of the births 0, 3 and 8; the last one took another's place, and its first rate is 1/4.
    change = (a.detach() - before).abs().max(dim=1).values
    assert change[2] < 0.3 * change[1]


# Resume.


@BOTH
@pytest.mark.parametrize("stop", [3, 6, 8])
@pytest.mark.parametrize("attached_first", [False, True])
def test_a_resumed_training_is_the_uninterrupted_one(make_plain, policy, stop, attached_first):
    whole, optimizer, _ = begin(make_plain, policy)
    train(whole, optimizer, 1, STEPS)
    half, optimizer, _ = begin(make_plain, policy)
    train(half, optimizer, 1, stop)
    file = io.BytesIO()
    torch.save([half.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    model = adapted(make_plain)
    optimizer = adamw(model)
    if attached_first:
        scheduler = attach(model, optimizer, policy=policy)
    for holder, state in zip((model, optimizer), torch.load(file, weights_only=True), strict=True):
        holder.load_state_dict(state)
    if not attached_first:
        scheduler = attach(model, optimizer, policy=policy)
    train(model, optimizer, stop + 1, STEPS)
    assert same(values(model), values(whole))
    assert scheduler.session.probe.history.ranks == list(RANKS.values())


def test_an_earlier_state_of_the_same_sizes_is_gone_on_from(make_plain):
    """At step 5 the ranks are those of the start, and the rows are not."""
    model, optimizer, _ = begin(make_plain)
    train(model, optimizer, 1, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3, 6)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, 3, STEPS)
    whole, optimizer, _ = begin(make_plain)
    train(whole, optimizer, 1, STEPS)
    assert same(values(model), values(whole))


# What listeners are told.


@BOTH
@pytest.mark.parametrize("form", FORMS)
def test_a_copy_that_follows_what_is_told_is_the_adapter(make_plain, policy, form):
    """Rows that stay are taken from before the step's event, by what it tells; the rest is read."""
    model, optimizer, scheduler = begin(make_plain, policy, **FORMS[form])
    before, told = {}, []

    def check(event):
        told.append(event.step)
        for resize in event.resizes:
            old, now = before[resize.name], resize.parameter.detach()
            assert (resize.old_size, resize.new_size) == (old.shape[resize.dim], now.shape[resize.dim])
            assert sorted([*resize.kept, *resize.removed]) == list(range(resize.old_size))
            assert list(resize.added) == list(range(len(resize.kept), resize.new_size))
            kept = old.index_select(resize.dim, torch.tensor(resize.kept)) * resize.factor
            torch.testing.assert_close(now.narrow(resize.dim, 0, len(resize.kept)), kept)

    policy_step = scheduler.policy.after_step

    def after_step(step):
        before.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return policy_step(step)

    scheduler.policy.after_step = after_step
    scheduler.on_growth(check)
    train(model, optimizer, 1, STEPS)
    assert told == list(MOVES)


def test_a_component_that_is_replaced_is_told_of_though_no_size_changed(make_plain):
    model, optimizer, scheduler = begin(make_plain)
    events = []
    scheduler.on_growth(events.append)
    train(model, optimizer, 1, 8)
    assert [
        (r.name.split(".")[-3], r.old_size, r.new_size, r.kept, r.removed, list(r.added))
        for r in events[-1].resizes
    ] == [(f"lora_{factor}", 3, 3, (0, 2), (1,), [2]) for factor in "ABE"]


class Several(Moving):
    """Shrinks, grows and shrinks again, all at step 3."""

    def after_step(self, step):
        event = super().after_step(step)
        if step.number == 3:
            # Its rows are now 0 to 2 and a new one.
            module = self.modules[1]
            module.shrink([1, 3])
            module.grow(2, self.generator(3, 1, "again"))
            module.shrink([0, 1, 3])
        return event


@pytest.mark.parametrize("form", FORMS)
def test_several_changes_of_one_event_are_told_and_followed_as_one(make_plain, form):
    model, optimizer, scheduler = begin(make_plain, Several, **FORMS[form])
    module = scheduler.session.modules[1]
    events = []
    scheduler.on_growth(events.append)
    train(model, optimizer, 1, 2)
    backward(model, 3)
    twin = copy.deepcopy([optimizer.state[p]["exp_avg"] for p in module.factors])
    gradients = [p.grad.clone() for p in module.factors]
    optimizer.step()
    assert [(r.kept, list(r.added)) for r in events[0].resizes if "lin1" in r.name] == [((1,), [1, 2])] * 3
    assert module.births == [[0, 3, 3]] * 3
    for p, average, gradient, dim in zip(module.factors, twin, gradients, (0, 1, 0), strict=True):
        moment = optimizer.state[p]["exp_avg"]
        wanted = average.lerp(gradient, 0.1).narrow(dim, 1, 1)
        torch.testing.assert_close(moment.narrow(dim, 0, 1), wanted)
        assert not moment.narrow(dim, 1, 2).any()


class ComesAndGoes(Moving):
    """At step 3 components come and go again, so that all is as it was."""

    def after_step(self, step):
        if step.number != 3:
            return None
        module, generator = self.modules[0], self.generator(3, 0, "short")
        module.grow(1, generator)
        module.shrink(range(3))
        module.set_reserve(2, generator)
        module.set_reserve(0)
        return Event([], np.zeros(2), "nothing stayed")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
def test_what_came_and_went_in_one_event_leaves_all_as_it_was(make_plain, kind):
    trained = []
    for policy in (Policy, ComesAndGoes):
        model = adapted(make_plain)
        optimizer = kind(trainable(model), lr=1e-2)
        scheduler = attach(model, optimizer, policy=policy)
        scheduler.on_growth(trained.append)
        train(model, optimizer, 1, 5)
        trained.append(values(model))
    assert len(trained) == 2
    assert same(*trained)


# Averages.


def of_copy(average, model):
    return [p.detach() for name, p in average.named_parameters() if "lora_" in name]


HOLDERS = {
    "AveragedModel": (swa_utils.AveragedModel, of_copy),
    "deepcopy": (copy.deepcopy, of_copy),
    "dictionary": (
        lambda model: {name: p.detach().clone() for name, p in model.named_parameters()},
        lambda average, model: [tensor for name, tensor in average.items() if "lora_" in name],
    ),
    "EMAModel": (
        lambda model: EMAModel(trainable(model), decay=0.9),
        lambda average, model: average.shadow_params,
    ),
}


def blurred(average, tensors):
    """Makes an average's numbers its own."""
    with torch.no_grad():
        for k, tensor in enumerate(tensors):
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(k)))
    return [tensor.clone() for tensor in tensors]


@BOTH
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_rows_that_stay_keep_their_averages_and_new_ones_start_as_the_adapters(
    make_plain, policy, form, twice, holder
):
    make, tensors_of = HOLDERS[holder]
    model, optimizer, scheduler = begin(make_plain, policy, **FORMS[form])
    average = make(model)
    for _ in range(1 + twice):
        keep_average(scheduler, average)
    events = []
    scheduler.on_growth(events.append)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for number in range(1, STEPS + 1):
        before = blurred(average, tensors_of(average, model))
        train(model, optimizer, number, number)
        resizes = {r.name: r for r in events[-1].resizes} if number in MOVES else {}
        now = tensors_of(average, model)
        for name, p, mean, old in zip(names, trainable(model), now, before, strict=True):
            resize = resizes.get(name)
            if resize is None:
                assert torch.equal(mean, old)
                continue
            kept = old.index_select(resize.dim, torch.tensor(resize.kept)) * resize.factor
            assert torch.equal(mean.narrow(resize.dim, 0, len(resize.kept)), kept)
            new = slice(len(resize.kept), None)
            mine, theirs = (v[new] if resize.dim == 0 else v[:, new] for v in (mean, p.detach()))
            assert torch.equal(mine, theirs)


def test_an_average_without_the_reserve_follows_the_active_rows(make_plain):
    model, optimizer, scheduler = begin(make_plain, MovingWithReserve)
    average = {k: v.clone() for k, v in peft.get_peft_model_state_dict(model).items()}
    keep_average(scheduler, average)
    a, b = (next(k for k in average if f"lin1.lora_{factor}" in k) for factor in "AB")
    train(model, optimizer, 1, 4)
    before = blurred(average, [average[a], average[b]])
    train(model, optimizer, 5, 5)
    assert torch.equal(average[a], before[0][1:])
    assert torch.equal(average[b], before[1][:, 1:])
    train(model, optimizer, 6, 7)
    before = blurred(average, [average[a], average[b]])
    train(model, optimizer, 8, 8)
    module = scheduler.session.modules[1]
    assert torch.equal(average[a][:2], before[0][[0, 2]])
    assert torch.equal(average[a][2], module.factors[0].detach()[2])
    assert torch.equal(average[b][:, :2], before[1][:, [0, 2]])
    # It was in reserve, and in no average.
    assert not average[b][:, 2].any()


class Replaces(Moving):
    """Replaces a component at step 8, and does nothing before."""

    def after_step(self, step):
        return super().after_step(step) if step.number == 8 else None


def test_an_average_that_nobody_keeps_is_told_of_though_its_sizes_fit(make_plain):
    model, optimizer, scheduler = begin(make_plain, Replaces)
    average = swa_utils.AveragedModel(model)
    with pytest.warns(UserWarning, match="AveragedModel averages this adapter but did not grow with it"):
        train(model, optimizer, 1, 8)
    assert average is not None
    assert list(scheduler.ranks.values()) == [3, 3]


@pytest.mark.filterwarnings("error")
def test_an_average_that_is_kept_is_not_told_of(make_plain):
    model, optimizer, scheduler = begin(make_plain, Replaces)
    keep_average(scheduler, swa_utils.AveragedModel(model))
    train(model, optimizer, 1, 8)


# A compiled graph, and several processes.


@BOTH
@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_training_is_compiled_once_and_agrees_with_eager_mode(make_plain, policy, form):
    torch._dynamo.reset()
    eager, optimizer, _ = begin(make_plain, policy, **FORMS[form])
    train(eager.train(), optimizer, 1, STEPS)
    model, optimizer, _ = begin(make_plain, policy, **FORMS[form])
    counter = CompileCounterWithBackend("aot_eager")
    train(torch.compile(model.train(), backend=counter, fullgraph=True), optimizer, 1, STEPS)
    assert counter.frame_count == 1
    torch._dynamo.reset()
    for mine, theirs in zip(trainable(model), trainable(eager), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Results of two processes."""
    out = tmp_path_factory.mktemp("moves")
    return torchrun(2, "moves.py", out)


@pytest.mark.slow
@pytest.mark.parametrize("way", moves.WAYS)
def test_two_processes_are_alike_bit_for_bit_and_equal_one_with_the_averaged_loss(processes, way):
    first, second = (result[way] for result in processes)
    assert first["ranks"] == second["ranks"]
    assert list(first["ranks"].values()) == RANKS[10]
    assert same(first["parameters"], second["parameters"])
    assert same(first["average"], second["average"])
    for mine, together in zip(moves.train_alone(2)["parameters"], first["parameters"], strict=True):
        assert (together - mine).norm() < 1e-9 * mine.norm()
