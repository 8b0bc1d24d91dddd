"""What `attach` looks at before it attaches: factors frozen or left out, optimizers that cannot do."""

import copy
import gc
import io
from weakref import ref

import pytest
import torch
from growing import growing
from increlora_rs import attach
from increlora_rs.training.fit import schedulers_of
from increlora_rs.training.modules import adapted_modules
from peft import get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer


@pytest.fixture
def model(make_plain):
    config = growing(r=3, lora_alpha=3, target_modules=["lin0", "lin1"])
    return get_peft_model(make_plain(), config)


def modules(model):
    return adapted_modules(model, "default")


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_lora_fa_is_told_by_what_it_freezes(model):
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=3, lr=1e-3)
    with pytest.raises(
        ValueError, match=r"lin0\.lora_A\S*, lin1\.lora_A\S*: frozen .*create_lorafa_optimizer"
    ):
        attach(model, optimizer, total_steps=20)


def test_lora_fa_is_refused_though_nothing_is_frozen(model):
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=3, lr=1e-3)
    for module in modules(model):
        module.factors[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"LoraFAOptimizer trains B alone"):
        attach(model, optimizer, total_steps=20)


@pytest.mark.parametrize("factor", ["a", "b", "e"])
def test_a_frozen_factor_is_named(model, factor):
    modules(model)[1].factors["abe".index(factor)].requires_grad_(False)
    optimizer = torch.optim.AdamW(trainable(model))
    with pytest.raises(ValueError, match=rf"^model: lin1\.lora_{factor.upper()}\S*: frozen"):
        attach(model, optimizer, total_steps=20)


def test_after_many_names_the_number_of_the_others_is_told(make_bert):
    config = growing(r=3, target_modules=["query", "key", "value"])
    model = get_peft_model(make_bert(), config)
    for module in modules(model):
        module.factors[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"lora_B\S* and 3 more: frozen"):
        attach(model, torch.optim.AdamW(trainable(model)), total_steps=20)


@pytest.mark.parametrize("factor", ["a", "b", "e"])
def test_a_factor_that_the_optimizer_does_not_hold_is_named(model, factor):
    missing = modules(model)[1].factors["abe".index(factor)]
    optimizer = torch.optim.AdamW([p for p in trainable(model) if p is not missing])
    with pytest.raises(ValueError, match=rf"of 'lin1' \(lin1\.lora_{factor.upper()}[^,]*\); make it"):
        attach(model, optimizer, total_steps=20)


def test_an_adapter_none_of_which_is_trainable_counts_as_none(model):
    for module in modules(model):
        for parameter in module.factors:
            parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="0 trainable adapters of increlora_rs"):
        attach(model, torch.optim.AdamW(model.parameters()), total_steps=20)


def test_a_module_that_is_frozen_whole_is_left_alone(model):
    optimizer = torch.optim.AdamW(trainable(model))
    for parameter in modules(model)[0].factors:
        parameter.requires_grad_(False)
    assert attach(model, optimizer, total_steps=20).budget == 6


def test_lora_plus_trains_to_the_budget(model, plain_input):
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0)
    scheduler = attach(model, optimizer, total_steps=20)
    for _ in range(20):
        model(plain_input).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scheduler.total_rank == scheduler.budget


class Lomo(torch.optim.Optimizer):
    pass


Lomo.__module__ = "lomo_optim.lomo"
REFUSED = {
    "a layer-wise one": lambda ps: LayerWiseDummyOptimizer({}),
    "LOMO": lambda ps: Lomo(ps, {}),
    "one that inherits from LOMO": lambda ps: type("Mine", (Lomo,), {})(ps, {}),
    "LBFGS": torch.optim.LBFGS,
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_cannot_train_what_grows_is_refused(model, name):
    with pytest.raises(ValueError, match="cannot train an adapter that grows: it"):
        attach(model, REFUSED[name](trainable(model)), total_steps=20)


class Around(torch.optim.Optimizer):
    """Goes around another optimizer and has nothing of its own, hooks included."""

    def __init__(self, inner):
        self.inside, self.param_groups, self.state = inner, inner.param_groups, inner.state


def test_an_optimizer_without_hooks_is_refused_with_the_way_out(model):
    optimizer = Around(torch.optim.AdamW(trainable(model)))
    with pytest.raises(ValueError, match=r"a Around does not call .*give the optimizer inside"):
        attach(model, optimizer, total_steps=20)


class SlowWeights(torch.optim.Optimizer):
    """Keeps slow weights around another optimizer; nothing is known of it."""

    def __init__(self, inner):
        self.optimizer = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.clone())
                slow.lerp_(parameter, 0.5)


def test_state_of_a_wrapper_follows_too(model, plain_input):
    optimizer = SlowWeights(torch.optim.AdamW(trainable(model)))
    scheduler = attach(model, optimizer, total_steps=20)
    with pytest.warns(UserWarning, match="'slow' of SlowWeights"):
        for _ in range(20):
            model(plain_input).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert scheduler.total_rank == scheduler.budget


class TwoSteps(torch.optim.Optimizer):
    """Calls the step of the optimizer inside by a name of its own, as implementations of SAM do."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.base_optimizer = inner

    def second_step(self):
        self.base_optimizer.step()


def test_a_step_under_a_name_of_its_own_counts(model, plain_input):
    optimizer = TwoSteps(torch.optim.AdamW(trainable(model)))
    scheduler = attach(model, optimizer, total_steps=20)
    for _ in range(20):
        model(plain_input).pow(2).mean().backward()
        optimizer.second_step()
        optimizer.zero_grad()
    assert scheduler.total_rank == scheduler.budget


# Who is attached.


def test_a_scheduler_is_found_by_its_model_after_its_optimizer_is_gone(model):
    known = ref(attach(model, torch.optim.AdamW(trainable(model)), total_steps=20))
    gc.collect()
    assert schedulers_of(model) == [known()]
    known().detach()
    assert schedulers_of(model) == []


def test_a_scheduler_goes_with_its_model(make_plain):
    config = growing(r=3, lora_alpha=3, target_modules=["lin0", "lin1"])
    model = get_peft_model(make_plain(), config)
    known = ref(attach(model, torch.optim.AdamW(trainable(model)), total_steps=20))
    del model
    gc.collect()
    assert known() is None


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_has_no_scheduler(model, way):
    attach(model, torch.optim.AdamW(trainable(model)), total_steps=20)
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert schedulers_of(copied) == []
    attach(copied, torch.optim.AdamW(trainable(copied)), total_steps=20)
    assert len(schedulers_of(copied)) == 1
