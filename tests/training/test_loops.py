"""Every kind of loop: accelerate, accumulation, schedules, checkpointing, precision, odd uses of modules."""

import copy
import warnings

import accelerate
import peft
import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, attach
from increlora_rs.training.modules import adapted_modules
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 12
STEPS = 40


class Twin(nn.Module):
    """Two maps, the first used twice; checkpointed in either way, or not."""

    def __init__(self, mode=None):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, 4)
        self.mode = mode

    def body(self, x):
        return torch.tanh(self.first(torch.tanh(self.first(x))))

    def forward(self, x):
        if self.mode is None:
            return self.second(self.body(x))
        return self.second(checkpoint(self.body, x, use_reentrant=self.mode == "reentrant"))


def adapted(mode=None, dtype=torch.float32, form=growing, **kwargs):
    torch.manual_seed(2)
    # Late, so that ranks grow through most of a training.
    schedule = {"importance_window": None, "growth_end": 0.6}
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["first", "second"]} | schedule
    return peft.get_peft_model(Twin(mode).to(dtype), form(**(settings | kwargs)))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def batch(t, dtype=torch.float32):
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(16, WIDTH, generator=generator)
    return x.to(dtype).requires_grad_(), torch.sin(2 * x[:, :4]).to(dtype)


def loss_of(model, t, dtype=torch.float32):
    x, y = batch(t, dtype)
    return nn.functional.mse_loss(model(x).float(), y.float())


def train(model, optimizer, steps=STEPS, dtype=torch.float32, first=1):
    for t in range(first, first + steps):
        loss_of(model, t, dtype).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("accumulation", [1, 2, 8])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_accelerate_by_hand_meets_the_budget(accumulation, clip):
    model = adapted()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    scheduler = attach(model, optimizer, total_steps=STEPS)
    for t in range(1, STEPS * accumulation + 1):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, t))
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    assert scheduler.step == STEPS
    assert scheduler.total_rank == scheduler.budget


SCHEDULES = {
    "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, STEPS),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
    "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, STEPS),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 5])
def test_learning_rate_schedules_are_followed_without_an_outlier(name, warmup):
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    rates = SCHEDULES[name](optimizer)
    scheduler = attach(model, optimizer, total_steps=STEPS, lr_warmup_steps=warmup)
    largest = 0.0
    for t in range(1, STEPS + 1):
        before = weights(model)
        loss_of(model, t).backward()
        optimizer.step()
        optimizer.zero_grad()
        for key, parameter in weights(model).items():
            if parameter.shape == before[key].shape:
                largest = max(largest, float((parameter - before[key]).abs().max()))
        rates.step()
    assert scheduler.total_rank == scheduler.budget
    assert 0 < largest < 3e-2


class Unknown(torch.optim.Optimizer):
    """An optimizer of whose state nothing is known: one vector for all of a parameter's entries."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if "flat" not in state:
                state["flat"] = torch.zeros(parameter.numel())
            state["flat"].lerp_(parameter.grad.reshape(-1), 0.1)
            parameter.add_(state["flat"].view_as(parameter), alpha=-1e-2)


def test_an_optimizer_of_unknown_state_starts_it_anew_with_a_warning():
    model = adapted()
    optimizer = Unknown(trainable(model))
    scheduler = attach(model, optimizer, total_steps=STEPS)
    with pytest.warns(UserWarning, match="'flat' of Unknown"):
        train(model, optimizer)
    assert scheduler.total_rank == scheduler.budget


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("form", [growing, IncreLoraConfig.paper])
def test_checkpointing_counts_the_importance_once_and_changes_nothing(mode, form):
    results = []
    for how in (None, mode):
        model = adapted(how, form=form, lora_dropout=0.2)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        scheduler = attach(model, optimizer, total_steps=STEPS)
        torch.manual_seed(5)
        train(model, optimizer)
        results.append((scheduler.scores, scheduler.history.tolist(), weights(model)))
    (scores, history, plain), (others, other_history, checkpointed) = results
    assert others == pytest.approx(scores, rel=1e-4)
    assert [row[:3] for row in history] == [row[:3] for row in other_history]
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-3, atol=1e-5, msg=name)


def test_evaluation_in_the_middle_changes_nothing():
    results = []
    for evaluates in (False, True):
        model = adapted(form=IncreLoraConfig.paper)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        scheduler = attach(model, optimizer, total_steps=STEPS)
        for t in range(1, STEPS + 1):
            if evaluates and t % 3 == 0:
                model.eval()
                with torch.no_grad():
                    model(batch(t)[0])
                model.train()
            train(model, optimizer, 1, first=t)
        results.append((scheduler.scores, weights(model)))
    assert results[0][0] == results[1][0]
    for name, parameter in results[0][1].items():
        assert torch.equal(parameter, results[1][1][name]), name


def test_inference_adds_no_importance():
    model = adapted(importance="sensitivity")
    attach(model, torch.optim.AdamW(trainable(model), lr=1e-2), total_steps=STEPS)
    for module in adapted_modules(model, "default"):
        module.factors[1].data.normal_()
    with torch.no_grad():
        model(batch(1)[0])
    probe = adapted_modules(model, "default")[0].layer.probes["default"]
    assert probe.armed
    assert probe.gauge.total.tolist() == [0.0, 0.0]


def test_a_module_frozen_for_a_while_keeps_its_values_and_then_learns_again():
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    first = adapted_modules(model, "default")[0]
    train(model, optimizer, 2)
    for parameter, _, _ in first.parameters:
        parameter.requires_grad_(False)
    before = first.factors[1].detach().clone()
    train(model, optimizer, 1, first=3)
    assert torch.equal(first.factors[1], before)
    for parameter, _, _ in first.parameters:
        parameter.requires_grad_(True)
    train(model, optimizer, STEPS - 3, first=4)
    assert not torch.equal(first.factors[1][:, :1], before)
    assert scheduler.total_rank == scheduler.budget


def test_float64_trains_in_float64():
    model = adapted(dtype=torch.float64)
    model = model.double()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, dtype=torch.float64)
    assert scheduler.total_rank == scheduler.budget
    assert {p.dtype for p in trainable(model)} == {torch.float64}


def test_a_bfloat16_base_has_float32_adapters_and_scores_near_those_of_float32():
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(dtype=dtype)
        assert {p.dtype for p in trainable(model)} == {torch.float32}
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        scheduler = attach(model, optimizer, total_steps=1000)
        train(model, optimizer, 10, dtype)
        scores.append(list(scheduler.scores.values()))
    assert scores[1] == pytest.approx(scores[0], rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_with_scores_near_those_of_float32(dtype):
    scores = []
    for enabled in (False, True):
        model = adapted()
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled and dtype == torch.float16)
        scheduler = attach(model, optimizer, total_steps=1000, scaler=scaler)
        for t in range(1, 11):
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                loss = loss_of(model, t)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scores.append(list(scheduler.scores.values()))
    assert scores[1] == pytest.approx(scores[0], rel=0.2)


def test_an_optimizer_made_anew_is_noticed():
    model = adapted()
    attach(model, torch.optim.AdamW(trainable(model), lr=1e-2), total_steps=STEPS)
    other = torch.optim.SGD(trainable(model), lr=0.0)
    with pytest.warns(UserWarning, match="took no step") as caught:
        train(model, other, 1010)
    assert len(caught) == 1


def test_another_number_of_steps_on_resume_is_told_and_the_plan_kept():
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, 5)
    plan, state = scheduler.schedule, optimizer.state_dict()
    scheduler.detach()
    optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match="total_steps=80, but the run that is resumed was planned for 40"):
        again = attach(model, optimizer, total_steps=80)
    assert again.step == 5
    assert (again.schedule.tinit, again.schedule.deltaT) == (plan.tinit, plan.deltaT)


def test_merging_in_the_middle_stops_at_the_growth_with_an_error():
    model = adapted(tinit=2, deltaT=3, top_h=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, 2)
    loss_of(model, 3).backward()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base weight and cannot grow"):
        optimizer.step()


def test_two_models_train_side_by_side():
    pairs = []
    for seed in (0, 1):
        model = adapted(lora_alpha=4 + seed)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        pairs.append((model, optimizer, attach(model, optimizer, total_steps=STEPS)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(1, STEPS + 1):
            for model, optimizer, _ in pairs:
                train(model, optimizer, 1, first=t)
    assert all(scheduler.total_rank == scheduler.budget for _, _, scheduler in pairs)


def test_a_run_stopped_inside_an_accumulation_goes_on_bit_for_bit():
    def begin():
        model = adapted(form=IncreLoraConfig.paper, tinit=2, deltaT=3, top_h=1)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        return model, optimizer, attach(model, optimizer, total_steps=STEPS)

    def run(model, optimizer, micro_batches):
        for m in micro_batches:
            (loss_of(model, m) / 2).backward()
            if m % 2:
                optimizer.step()
                optimizer.zero_grad()

    whole, optimizer, uninterrupted = begin()
    run(whole, optimizer, range(2 * STEPS))

    model, optimizer, _ = begin()
    run(model, optimizer, range(9))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model, optimizer, scheduler = begin()
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    for name, gradient in gradients.items():
        model.get_parameter(name).grad = gradient
    run(model, optimizer, range(9, 2 * STEPS))
    assert scheduler.history.tolist() == uninterrupted.history.tolist()
    for name, parameter in weights(whole).items():
        assert torch.equal(parameter, weights(model)[name]), name


def test_an_optimizer_of_deepspeed_that_is_not_known_is_refused_with_the_reason():
    class ZeroOptimizer:
        pass

    ZeroOptimizer.__module__ = "deepspeed.runtime.zero.stage_1_and_2"
    with pytest.raises(ValueError, match=r"DeepSpeed keeps parameters in a form.*not known here.*Or use DDP"):
        attach(adapted(), ZeroOptimizer(), total_steps=STEPS)


def test_parameters_partitioned_by_deepspeed_are_refused_without_its_optimizer():
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    trainable(model)[0].ds_id = 0
    with pytest.raises(ValueError, match=r"ZeRO has laid its parameters out.*give attach the engine"):
        attach(model, optimizer, total_steps=STEPS)


@pytest.mark.parametrize("keyword", [True, False])
def test_a_closure_trains_as_the_plain_loop_does(keyword):
    def run(with_closure):
        model = adapted(form=IncreLoraConfig.paper)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        scheduler = attach(model, optimizer, total_steps=STEPS)
        for t in range(1, STEPS + 1):

            def closure(t=t):
                optimizer.zero_grad()
                loss = loss_of(model, t)
                loss.backward()
                return loss

            if not with_closure:
                closure()
                optimizer.step()
            elif keyword:
                optimizer.step(closure=closure)
            else:
                optimizer.step(closure)
        return scheduler.history.tolist(), weights(model)

    (history, plain), (other, closed) = run(False), run(True)
    assert history == other
    for name, parameter in plain.items():
        assert torch.equal(parameter, closed[name]), name


def test_lbfgs_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match=r"LBFGS cannot .* one flat vector"):
        attach(model, torch.optim.LBFGS(trainable(model)), total_steps=STEPS)


def test_another_budget_on_resume_is_told():
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    scheduler = attach(model, optimizer, total_steps=STEPS)
    state = optimizer.state_dict()
    scheduler.detach()
    other = adapted(r=5)
    optimizer = torch.optim.AdamW(trainable(other), lr=1e-2)
    optimizer.load_state_dict(state)
    with pytest.warns(UserWarning, match="r=5 makes a budget of 10, but the run .* planned for 6"):
        attach(other, optimizer, total_steps=STEPS)
