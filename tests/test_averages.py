"""Averages of the weights (EMA, SWA) follow the ranks, whoever holds them."""

import copy
import warnings

import increlora_rs
import peft
import pytest
import pytorch_lightning as lightning
import torch
from diffusers.training_utils import EMAModel
from increlora_rs import IncreLoraCallback, IncreLoraConfig, attach, keep_average
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
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
        model = peft.get_peft_model(make_plain(), IncreLoraConfig(**(settings | config)))
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
        super().__init__(model, lambda m: {k: v.clone() for k, v in peft.get_peft_model_state_dict(m).items()})

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
