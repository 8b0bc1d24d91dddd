"""Averages of the weights (EMA, SWA) follow the ranks, whoever holds them."""

import copy
import warnings

import increlora_rs
import peft
import pytest
import pytorch_lightning as lightning
import torch
from diffusers.training_utils import EMAModel
from growing import growing
from increlora_rs import IncreLoraCallback, attach, keep_average
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from rows import Rows
from torch import nn
from torch.optim import swa_utils
from transformers import Trainer, TrainerCallback, TrainingArguments

DECAY = 0.8
# The growth leaves the output alone under all of these.
FORMS = {
    "default": {},
    "rank": {"scaling": "rank"},
    "rslora": {"scaling": "rank", "use_rslora": True},
    "sensitivity": {"importance": "sensitivity", "init_lora_weights": "gaussian"},
}


@pytest.fixture
def training(make_plain):
    """``training(**config)``: a model whose two modules grow from rank 1 to 3 after the steps 4 and 6."""

    def build(**config):
        torch.manual_seed(3)
        settings = {"r": 3, "lora_alpha": 6, "target_modules": ["lin0", "lin1"]}
        settings |= {"tinit": 3, "deltaT": 2, "top_h": 2}
        model = peft.get_peft_model(make_plain(), growing(**(settings | config)))
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)

    return build


def step(model, optimizer, number):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(number))
    (model(x) - x[:, :6].sin()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def sizes(model):
    return [tuple(p.shape) for n, p in model.named_parameters() if "lora_" in n]


def named(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def key_of(model, part):
    return next(name for name, _ in model.named_parameters() if part in name)


# Every holder is a class that makes an average of `model`, updates it, and gives a model with its weights.


class Averaged:
    """torch's AveragedModel."""

    def __init__(self, model, **options):
        self.average = swa_utils.AveragedModel(model, **options)

    def update(self, model):
        self.average.update_parameters(model)

    def as_model(self, model):
        return self.average.module


class Copied:
    """A copy of the model that a loop of one's own writes to."""

    def __init__(self, model):
        self.average = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model):
        for mean, new in zip(self.average.parameters(), model.parameters(), strict=True):
            mean.lerp_(new, 1 - DECAY)

    def as_model(self, model):
        return self.average


class Named:
    """A dictionary by name, whose tensors are replaced at each update."""

    def __init__(self, model, of=named):
        self.of, self.average = of, of(model)

    def update(self, model):
        for name, new in self.of(model).items():
            assert self.average[name].shape == new.shape
            self.average[name] = DECAY * self.average[name] + (1 - DECAY) * new

    def as_model(self, model):
        made = copy.deepcopy(model)
        made.load_state_dict(self.average, strict=False)
        return made


class AdapterState(Named):
    """PEFT's state dict of an adapter, without its name and without components in reserve."""

    def __init__(self, model):
        super().__init__(
            model, lambda m: {k: v.clone() for k, v in peft.get_peft_model_state_dict(m).items()}
        )

    def as_model(self, model):
        made = copy.deepcopy(model)
        peft.set_peft_model_state_dict(made, self.average)
        return made


class Shadow:
    """diffusers' EMAModel."""

    def __init__(self, model, trainable=False, **options):
        self.trainable = trainable
        self.average = EMAModel(self.of(model), decay=DECAY, min_decay=DECAY, **options)

    def of(self, model):
        return [p for p in model.parameters() if p.requires_grad or not self.trainable]

    def update(self, model):
        self.average.step(self.of(model))

    def as_model(self, model):
        made = copy.deepcopy(model)
        self.average.copy_to(self.of(made))
        return made


HOLDERS = {
    "AveragedModel, SWA": Averaged,
    "AveragedModel, avg_fn": lambda m: Averaged(m, avg_fn=swa_utils.get_ema_avg_fn(DECAY)),
    "AveragedModel, multi_avg_fn": lambda m: Averaged(m, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY)),
    "AveragedModel, SWA multi_avg_fn": lambda m: Averaged(m, multi_avg_fn=swa_utils.get_swa_multi_avg_fn()),
    "AveragedModel, use_buffers": lambda m: Averaged(m, use_buffers=True),
    "deepcopy": Copied,
    "dictionary": Named,
    "PEFT's state dict": AdapterState,
    "EMAModel": Shadow,
    "EMAModel, foreach": lambda m: Shadow(m, foreach=True),
    "EMAModel, warm-up": lambda m: Shadow(m, use_ema_warmup=True),
    "EMAModel, trainable": lambda m: Shadow(m, trainable=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_growth_leaves_an_averages_output_as_it_was(training, plain_input, holder, form):
    model, optimizer = training(**FORMS[form])
    scheduler = attach(model, optimizer, total_steps=12)
    held = HOLDERS[holder](model)
    grown = []
    # Told first, before the average is.
    scheduler.on_growth(lambda event: grown.append(event.step))
    keep_average(scheduler, held.average)
    for number in range(1, 9):
        before = held.as_model(model)(plain_input).detach()
        if number in (4, 6):
            assert not grown or grown[-1] < number
        step(model, optimizer, number)
        after = held.as_model(model)(plain_input).detach()
        torch.testing.assert_close(after, before, rtol=0.0, atol=2e-6)
        held.update(model)
        assert sizes(held.as_model(model)) == sizes(model)
    assert grown == [4, 6]
    assert (held.as_model(model)(plain_input) - model(plain_input)).abs().max() > 1e-4


def test_an_average_of_all_steps_is_that_of_the_rows_since_their_birth(training):
    model, optimizer = training()
    averaged = swa_utils.AveragedModel(model)
    scheduler = attach(model, optimizer, total_steps=12)
    keep_average(scheduler, averaged)
    averaged.update_parameters(model)
    layer = scheduler.session.modules[0]
    sums, count = layer.factors[1].detach().clone(), 1
    for number in range(1, 9):
        step(model, optimizer, number)
        averaged.update_parameters(model)
        # A row that is not born counts with B = 0.
        sums = nn.functional.pad(sums, (0, layer.rows - sums.shape[1])) + layer.factors[1].detach()
        count += 1
    mean = dict(averaged.module.named_parameters())[key_of(model, "lin0.lora_B")]
    torch.testing.assert_close(mean, sums / count)


@pytest.mark.parametrize("form", FORMS)
def test_an_averaged_model_is_saved_loaded_and_exported_with_the_ranks(
    training, make_plain, plain_input, tmp_path, form
):
    model, optimizer = training(**FORMS[form])
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY))
    scheduler = attach(model, optimizer, total_steps=12)
    keep_average(scheduler, averaged)
    for number in range(1, 13):
        step(model, optimizer, number)
        averaged.update_parameters(model)
    scheduler.detach()
    averaged.module.save_pretrained(tmp_path / "adapter")
    want = averaged(plain_input)
    loaded = peft.PeftModel.from_pretrained(make_plain(), tmp_path / "adapter")
    torch.testing.assert_close(loaded(plain_input), want, rtol=0.0, atol=1e-6)
    assert increlora_rs.rank_table(tmp_path / "adapter").total_rank == scheduler.total_rank == 6
    assert increlora_rs.growth_history(tmp_path / "adapter").steps == [4, 6]
    increlora_rs.export_lora(tmp_path / "adapter", tmp_path / "lora")
    exported = peft.PeftModel.from_pretrained(make_plain(), tmp_path / "lora")
    torch.testing.assert_close(exported(plain_input), want, rtol=0.0, atol=1e-5)


def test_statistics_of_batch_norm_are_taken_by_the_averaged_model(training):
    model, optimizer = training()
    model.base_model.model.lin1 = nn.Sequential(nn.BatchNorm1d(20), model.base_model.model.lin1)
    averaged = swa_utils.AveragedModel(model)
    keep_average(attach(model, optimizer, total_steps=12), averaged)
    for number in range(1, 9):
        step(model, optimizer, number)
        averaged.update_parameters(model)
    swa_utils.update_bn([torch.randn(9, 12) for _ in range(3)], averaged)
    norm = averaged.module.base_model.model.lin1[0]
    assert int(norm.num_batches_tracked) == 3
    assert averaged(torch.randn(4, 12)).isfinite().all()


def test_emamodel_stores_and_restores_the_weights_around_an_evaluation(training, plain_input):
    model, optimizer = training()
    held = Shadow(model)
    keep_average(attach(model, optimizer, total_steps=12), held.average)
    for number in range(1, 7):
        step(model, optimizer, number)
        held.update(model)
        own = model(plain_input)
        held.average.store(model.parameters())
        held.average.copy_to(model.parameters())
        assert not torch.equal(model(plain_input), own) or number == 1
        held.average.restore(model.parameters())
        assert torch.equal(model(plain_input), own)


def test_weights_put_aside_by_emamodel_follow_the_end_of_the_training(training, plain_input):
    model, optimizer = training(init_lora_weights="svd", advance_learning=True)
    held = Shadow(model)
    scheduler = attach(model, optimizer, total_steps=12)
    keep_average(scheduler, held.average)
    step(model, optimizer, 1)
    own = model.eval()(plain_input)
    held.average.store(model.parameters())
    held.average.copy_to(model.parameters())
    scheduler.detach()
    held.average.restore(model.parameters())
    assert torch.equal(model(plain_input), own)


def test_components_in_reserve_are_averaged_and_dropped_at_the_end(training, plain_input):
    model, optimizer = training(init_lora_weights="svd", advance_learning=True)
    averaged = swa_utils.AveragedModel(model)
    scheduler = attach(model, optimizer, total_steps=12)
    keep_average(scheduler, averaged)
    for number in range(1, 5):
        assert sizes(averaged) == sizes(model)
        step(model, optimizer, number)
        averaged.update_parameters(model)
    before = averaged.eval()(plain_input)
    assert any(module.rows > module.rank for module in scheduler.session.modules)
    scheduler.detach()
    assert sizes(averaged) == sizes(model)
    assert torch.equal(averaged(plain_input), before)


def test_under_the_papers_form_an_average_changes_as_the_adapter_does(training, plain_input):
    model, optimizer = training(
        init_lora_weights="svd", scaling="rank", preserve_output=False, importance="sensitivity"
    )
    copied = copy.deepcopy(model)
    keep_average(attach(model, optimizer, total_steps=12), copied)
    for number in range(1, 7):
        with torch.no_grad():
            for mean, new in zip(copied.parameters(), model.parameters(), strict=True):
                mean.copy_(new)
        optimizer_parameters = named(model)
        step(model, optimizer, number)
        for name, old in optimizer_parameters.items():
            # The growth alone, without the step before it.
            parameter = dict(model.named_parameters())[name]
            with torch.no_grad():
                parameter[tuple(slice(0, size) for size in old.shape)] = old
        torch.testing.assert_close(copied(plain_input), model(plain_input))


def test_an_average_of_its_own_scale_keeps_it(training):
    model, optimizer = training(scaling="rank")
    copied = copy.deepcopy(model)
    layer = copied.base_model.model.lin0
    layer.set_scale("default", 0.5)
    keep_average(attach(model, optimizer, total_steps=12), copied)
    for number in range(1, 7):
        step(model, optimizer, number)
    assert layer.scaling["default"] == pytest.approx(0.5 * model.base_model.model.lin0.scaling["default"])


def test_tensors_and_parameters_of_an_average_stay_the_objects_that_they_were(training):
    model, optimizer = training()
    held, copied = Shadow(model), copy.deepcopy(model)
    scheduler = attach(model, optimizer, total_steps=12)
    keep_average(scheduler, held.average)
    keep_average(scheduler, copied)
    before = [*map(id, held.average.shadow_params), *map(id, copied.parameters())]
    for number in range(1, 7):
        step(model, optimizer, number)
    assert [*map(id, held.average.shadow_params), *map(id, copied.parameters())] == before


def test_an_average_of_another_dtype_keeps_it(training):
    model, optimizer = training()
    average = {name: value.double() for name, value in named(model).items()}
    keep_average(attach(model, optimizer, total_steps=12), average)
    for number in range(1, 7):
        step(model, optimizer, number)
    assert {value.dtype for value in average.values()} == {torch.float64}


def test_a_row_older_than_what_the_average_has_seen_adds_nothing_to_it(training, plain_input):
    model, optimizer = training()
    scheduler = attach(model, optimizer, total_steps=12)
    copied, average = copy.deepcopy(model), named(model)
    for number in range(1, 6):
        step(model, optimizer, number)
    before = copied(plain_input)
    keep_average(scheduler, copied)
    keep_average(scheduler, average)
    assert sizes(copied) == sizes(model)
    assert torch.equal(copied(plain_input), before)
    assert not average[key_of(model, "lin0.lora_B")][:, 1:].any()


def test_an_average_is_left_alone_once_its_handle_is_removed(training):
    model, optimizer = training()
    average = named(model)
    handle = keep_average(attach(model, optimizer, total_steps=12), average)
    first = {name: value.shape for name, value in average.items()}
    handle.remove()
    for number in range(1, 7):
        step(model, optimizer, number)
    assert {name: value.shape for name, value in average.items()} == first


def test_a_function_gives_an_average_that_is_made_anew(training):
    model, optimizer = training()
    average = named(model)
    keep_average(attach(model, optimizer, total_steps=12), lambda: average)
    for number in range(1, 7):
        step(model, optimizer, number)
        average = {n: DECAY * average[n] + (1 - DECAY) * p for n, p in named(model).items()}
    assert [tuple(v.shape) for n, v in average.items() if "lora_" in n] == sizes(model)


@pytest.mark.parametrize("part", ["model", "base_model", "base_model.model"])
def test_a_copy_of_a_part_or_of_a_larger_model_follows(training, part):
    model, optimizer = training()
    inside, outside = copy.deepcopy(model.get_submodule(part) if part != "model" else model), None
    outside = nn.ModuleDict({"student": copy.deepcopy(model), "head": nn.Linear(2, 2)})
    scheduler = attach(model, optimizer, total_steps=12)
    keep_average(scheduler, inside)
    keep_average(scheduler, outside)
    for number in range(1, 7):
        step(model, optimizer, number)
    assert sizes(inside) == sizes(outside) == sizes(model)


def test_a_module_that_holds_the_trained_model_and_its_average_is_understood(training):
    model, optimizer = training()
    both = nn.ModuleDict({"online": model, "ema": copy.deepcopy(model)})
    keep_average(attach(model, optimizer, total_steps=12), both)
    for number in range(1, 7):
        step(model, optimizer, number)
    assert sizes(both["ema"]) == sizes(model)


class Keeper:
    """An object with a copy of the model, as timm's ModelEma is."""

    def __init__(self, model):
        self.ema = copy.deepcopy(model)


def test_an_object_that_holds_a_copy_follows(training):
    model, optimizer = training()
    keeper = Keeper(model)
    keep_average(attach(model, optimizer, total_steps=12), keeper)
    for number in range(1, 7):
        step(model, optimizer, number)
    assert sizes(keeper.ema) == sizes(model)


def test_a_list_of_given_parameters_follows(training):
    model, optimizer = training()
    order = [p for p in reversed(list(model.parameters())) if p.requires_grad and p.dim() == 2][:4]
    average = [p.detach().clone() for p in order]
    keep_average(attach(model, optimizer, total_steps=12), average, parameters=iter(order))
    for number in range(1, 7):
        step(model, optimizer, number)
    assert [value.shape for value in average] == [p.shape for p in order]


def test_a_compiled_model_and_the_average_of_it_agree_on_the_ranks(training, plain_input):
    model, optimizer = training()
    compiled = torch.compile(model, backend="aot_eager")
    averaged = swa_utils.AveragedModel(model)
    scheduler = attach(compiled, optimizer, total_steps=12)
    keep_average(scheduler, averaged)
    for number in range(1, 7):
        step(compiled, optimizer, number)
        averaged.update_parameters(compiled)
    assert sizes(averaged) == sizes(model)
    assert averaged(plain_input).isfinite().all()


# What cannot be right is told.


def wrong(kind):
    def build(model):
        average = named(model)
        key = key_of(model, "lin0.lora_A")
        if kind == "rows":
            average[key] = torch.zeros(7, 12)
        elif kind == "columns":
            average[key] = torch.zeros(1, 13)
        elif kind == "the parameter itself":
            average[key] = dict(model.named_parameters())[key]
        elif kind == "two of one module":
            return nn.ModuleDict({"student": copy.deepcopy(model), "teacher": copy.deepcopy(model)})
        elif kind == "the trained model":
            return model
        elif kind == "nothing of it":
            return nn.Linear(2, 2)
        elif kind == "a list of other length":
            return [torch.zeros(2)]
        elif kind == "no tensors":
            return {"a": torch.zeros(2)}
        return average

    return build


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("rows", r"has 7 rows, but the adapter has 1 at 'lin0'; load the average"),
        ("columns", r"has shape \(1, 13\), but is to be the average of lora_A of 'lin0', \(1, 12\)"),
        ("the parameter itself", "is the trained parameter itself; an average needs a copy"),
        ("two of one module", "give the copy of the adapted model alone"),
        ("the trained model", "holds nothing of the adapter 'default' that grows"),
        ("nothing of it", "a Linear holds nothing of the adapter"),
        ("a list of other length", r"it has 1 tensors, but .* 10 and 6 and 6; give the parameters"),
        ("no tensors", "a dict holds nothing of the adapter"),
    ],
)
def test_what_is_no_average_of_the_adapter_is_refused(training, kind, message):
    model, optimizer = training()
    scheduler = attach(model, optimizer, total_steps=12)
    with pytest.raises(ValueError, match=message):
        keep_average(scheduler, wrong(kind)(model))


def test_what_cannot_hold_an_average_is_refused(training):
    model, optimizer = training()
    scheduler = attach(model, optimizer, total_steps=12)
    with pytest.raises(TypeError, match="a int holds no average that is known here"):
        keep_average(scheduler, 3)
    with pytest.raises(TypeError, match="is no RankScheduler"):
        keep_average(model, named(model))
    with pytest.raises(ValueError, match="they say what a list is of, but average is a dict"):
        keep_average(scheduler, named(model), parameters=model.parameters())


def test_an_average_loaded_with_more_rows_than_the_adapter_stops_the_next_growth(training):
    model, optimizer = training()
    average = named(model)
    keep_average(attach(model, optimizer, total_steps=12), average)
    average[key_of(model, "lin0.lora_A")] = torch.zeros(4, 12)
    with pytest.raises(ValueError, match="load the average and the adapter of the same checkpoint"):
        for number in range(1, 7):
            step(model, optimizer, number)


# Averages of which nobody told.


def until_growth(model, optimizer):
    for number in range(1, 5):
        step(model, optimizer, number)


@pytest.mark.parametrize("made", ["before", "after"])
def test_an_averaged_model_that_does_not_follow_is_told_of_once(training, made):
    model, optimizer = training()
    averaged = swa_utils.AveragedModel(model) if made == "before" else None
    attach(model, optimizer, total_steps=12)
    averaged = averaged or swa_utils.AveragedModel(model)
    with pytest.warns(UserWarning, match="step 4: AveragedModel averages this adapter but did not grow"):
        until_growth(model, optimizer)
    with pytest.raises(RuntimeError):
        averaged.update_parameters(model)
    step(model, optimizer, 5)
    step(model, optimizer, 6)


def test_an_emamodel_that_does_not_follow_is_told_of(training):
    model, optimizer = training()
    held = Shadow(model)
    attach(model, optimizer, total_steps=12)
    with pytest.warns(UserWarning, match="step 4: EMAModel averages this adapter"):
        until_growth(model, optimizer)
    assert len(held.average.shadow_params) == 10


@pytest.mark.parametrize("kept", ["plain copy", "another model's", "brought along by hand"])
def test_copies_that_are_no_stale_averages_are_not_told_of(training, kept):
    model, optimizer = training()
    scheduler = attach(model, optimizer, total_steps=12)
    other = copy.deepcopy(model)
    if kept == "another model's":
        other = swa_utils.AveragedModel(training()[0])
    elif kept == "brought along by hand":
        other = swa_utils.AveragedModel(model)
        scheduler.on_growth(lambda _: other.module.load_state_dict(model.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        until_growth(model, optimizer)
    assert sizes(other) != []


# Loads.


@pytest.mark.parametrize("attached", ["before the load", "after the load"])
def test_an_average_resumed_with_its_training_is_the_uninterrupted_one(training, attached):
    def begin():
        model, optimizer = training()
        return model, optimizer, swa_utils.AveragedModel(model), Shadow(model)

    def go_on(first, last, model, optimizer, averaged, held):
        for number in range(first, last + 1):
            step(model, optimizer, number)
            averaged.update_parameters(model)
            held.update(model)

    whole = begin()
    for average in (whole[2], whole[3].average):
        keep_average(attach_once(*whole[:2]), average)
    go_on(1, 8, *whole)
    half = begin()
    for average in (half[2], half[3].average):
        keep_average(attach_once(*half[:2]), average)
    go_on(1, 5, *half)
    saved = copy.deepcopy([part.state_dict() for part in (*half[:3], half[3].average)])
    model, optimizer, averaged, held = resumed = begin()
    if attached == "before the load":
        for average in (averaged, held.average):
            keep_average(attach_once(model, optimizer), average)
    for part, state in zip((model, optimizer, averaged, held.average), saved, strict=True):
        part.load_state_dict(state)
    if attached == "after the load":
        for average in (averaged, held.average):
            keep_average(attach_once(model, optimizer), average)
    go_on(6, 8, *resumed)
    for mine, theirs in zip(averaged.parameters(), whole[2].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(held.average.shadow_params, whole[3].average.shadow_params, strict=True):
        assert torch.equal(mine, theirs)


def attach_once(model, optimizer):
    running = increlora_rs.training.fit.schedulers_of(model)
    return running[0] if running else attach(model, optimizer, total_steps=12)


@pytest.mark.parametrize("holder", ["AveragedModel, SWA", "dictionary", "EMAModel"])
def test_after_a_load_of_other_ranks_an_average_starts_anew_with_a_warning(training, plain_input, holder):
    model, optimizer = training()
    first = copy.deepcopy(model.state_dict())
    scheduler = attach(model, optimizer, total_steps=12)
    held = HOLDERS[holder](model)
    keep_average(scheduler, held.average)
    for number in range(1, 6):
        step(model, optimizer, number)
        held.update(model)
    model.load_state_dict(first)
    own = model(plain_input)
    causes = []

    def check(event):
        causes.append(event.cause)
        torch.testing.assert_close(held.as_model(model)(plain_input), own)
        handle.remove()

    handle = scheduler.on_growth(check)
    with pytest.warns(UserWarning, match="the averages of 2 modules, 'lin0' the first, start anew"):
        step(model, optimizer, 6)
    assert causes == ["load"]


@pytest.mark.filterwarnings("ignore:the state .* of AdamW has shape")
def test_an_average_loaded_along_with_an_adapter_of_other_ranks_is_kept(training, plain_input):
    model, optimizer = training()
    averaged = swa_utils.AveragedModel(model)
    first = copy.deepcopy((model.state_dict(), averaged.state_dict()))
    scheduler = attach(model, optimizer, total_steps=12)
    keep_average(scheduler, averaged)
    for number in range(1, 6):
        step(model, optimizer, number)
        averaged.update_parameters(model)
    model.load_state_dict(first[0])
    averaged.load_state_dict(first[1])
    before = averaged(plain_input)
    step(model, optimizer, 6)
    assert torch.equal(averaged(plain_input), before)


def test_an_adapter_that_is_loaded_at_the_end_leaves_the_average_alone(training, plain_input):
    model, optimizer = training()
    first = copy.deepcopy(model.state_dict())
    averaged, scheduler = swa_utils.AveragedModel(model), attach(model, optimizer, total_steps=12)
    keep_average(scheduler, averaged)
    for number in range(1, 6):
        step(model, optimizer, number)
        averaged.update_parameters(model)
    before = averaged(plain_input)
    model.load_state_dict(first)
    scheduler.detach()
    assert torch.equal(averaged(plain_input), before)


# Lightning.


class Module(lightning.LightningModule):
    """What a user writes: attach where the optimizer is made, and the averages at once."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.drift = []

    def training_step(self, batch, _):
        return (self.model(batch) - batch[:, :6].sin()).square().mean()

    def validation_step(self, batch, _):
        self.drift.append(float((self.model(batch) - batch[:, :6].sin()).square().mean()))

    def configure_optimizers(self):
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=2e-2)
        self.growth = attach(self.model, optimizer, total_steps=12)
        for callback in self.trainer.callbacks:
            if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                keep_average(self.growth, callback)
        return optimizer


def data():
    x = torch.randn(12, 12, generator=torch.Generator().manual_seed(5))
    return torch.utils.data.DataLoader(x, batch_size=4)


def fit(module, *callbacks, epochs=4, **options):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    with warnings.catch_warnings():
        # Lightning on the number of workers, and on what it is about to rename.
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric|torch")
        trainer.fit(module, data(), data(), **options)


LIGHTNING = {
    "WeightAveraging": WeightAveraging,
    "WeightAveraging, parameters": lambda: WeightAveraging(use_buffers=False),
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=DECAY),
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2),
}


@pytest.mark.parametrize("kind", LIGHTNING)
def test_the_averages_of_lightning_follow(training, make_plain, plain_input, tmp_path, kind):
    module = Module(training()[0])
    fit(module, LIGHTNING[kind]())
    assert module.growth.total_rank == 6
    module.growth.detach()
    module.model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(make_plain(), tmp_path / "adapter")
    torch.testing.assert_close(loaded(plain_input), module.model.eval()(plain_input))


def test_a_lightning_training_with_an_average_resumes_as_the_uninterrupted_one(training, tmp_path):
    whole, resumed = Module(training()[0]), Module(training()[0])
    each_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(whole, EMAWeightAveraging(decay=DECAY), each_epoch)
    fit(resumed, EMAWeightAveraging(decay=DECAY), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=False)
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_module_that_keeps_its_scheduler_is_averaged_in_a_second_fit(training):
    module = Module(training()[0])
    fit(module, EMAWeightAveraging(decay=DECAY), epochs=1)
    module.growth.detach()
    fit(module, EMAWeightAveraging(decay=DECAY))
    assert module.growth.total_rank == 6


# Trainer.


class Averaging(TrainerCallback):
    """What a user writes to average in Trainer."""

    def __init__(self, update):
        self.update = update

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.update(model)


@pytest.mark.parametrize("holder", ["AveragedModel, SWA", "EMAModel", "dictionary"])
def test_averages_given_to_the_callback_follow_in_trainer(make_bert, tmp_path, holder):
    config = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query", "value"], "tinit": 3, "deltaT": 2}
    model = peft.get_peft_model(make_bert(), growing(**config))
    held = HOLDERS[holder](model)
    heard = []
    callback = IncreLoraCallback(averages=[held.average], on_growth=heard.append)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=9,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback, Averaging(held.update)]).train()
    assert heard
    assert sizes(held.as_model(model)) == sizes(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"averages": {}}, "averages: a dict is no list"), ({"on_growth": 3}, "on_growth=3 cannot be called")],
)
def test_wrong_arguments_of_the_callback_are_refused_by_name(arguments, message):
    with pytest.raises(TypeError, match=message):
        IncreLoraCallback(**arguments)
