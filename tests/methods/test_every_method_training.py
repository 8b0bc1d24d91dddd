"""Every method trains, by ``attach`` in a loop of one's own and by the callback in Trainer, in every usual
way.

Where a method changes nothing but by gradients, what is attached must change nothing.
"""

import copy
import math
from contextlib import nullcontext

import peft
import pytest
import torch
import transformers
from increlora_rs import IncreLoraCallback, attach
from method_cases import (
    CASES,
    EVERY,
    adapted,
    adapted_modules,
    assert_equal_bits,
    batch,
    config_of,
    optimizer_of,
    ranks_of,
    ready,
    run,
    trainable,
)
from rows import Rows
from torch.nn.utils import clip_grad_norm_
from transformers import Trainer, TrainerCallback, TrainingArguments

STEPS = 12
BUDGET = 3 * 6


def attached(model, optimizer=None, **arguments):
    torch.manual_seed(12)
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    return optimizer, attach(model, optimizer, total_steps=STEPS, **arguments)


def assert_done(method, model, scheduler, before):
    """The training did all that the method does, and its parameters are finite."""
    assert scheduler.ranks == ranks_of(method, model)
    assert scheduler.total_rank == sum(scheduler.ranks.values())
    does = CASES[method.name].ranks
    if does == "grow":
        assert scheduler.total_rank == BUDGET
        assert scheduler.ranks != before
    elif does == "fall":
        held = {name: layer.r["default"] for name, layer in adapted_modules(model).items()}
        assert scheduler.total_rank < sum(held.values())
        assert all(rank <= held[name] for name, rank in scheduler.ranks.items())
    else:
        assert scheduler.ranks == before
    assert (len(scheduler.history) > 0) is CASES[method.name].told
    assert all(torch.isfinite(p).all() for p in trainable(model).values())


# A loop of one's own.


@EVERY
def test_a_plain_loop_without_attach_lowers_the_loss(method, make_bert):
    model = adapted(method, make_bert()).train()
    optimizer, losses = optimizer_of(model), []
    for _ in range(20):
        loss = model(**batch(0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@EVERY
def test_an_attached_loop_does_all_that_the_method_does(method, make_bert):
    model = ready(method, make_bert())
    before = ranks_of(method, model)
    optimizer, scheduler = attached(model)
    run(model, optimizer, range(STEPS))
    assert scheduler.step == STEPS
    assert_done(method, model, scheduler, before)


@EVERY
def test_an_attached_loop_again_gives_the_same_bits(method, make_bert):
    ends = []
    for _ in range(2):
        model = ready(method, make_bert(), lora_dropout=0.2)
        optimizer, _ = attached(model)
        run(model, optimizer, range(STEPS))
        ends.append(trainable(model))
    assert_equal_bits(*ends)


@EVERY
def test_what_is_attached_to_a_method_that_does_nothing_changes_nothing(method, make_bert):
    if CASES[method.name].acts:
        pytest.skip("it does something")
    plain, watched = (ready(method, make_bert()) for _ in range(2))
    run(plain, optimizer_of(plain), range(STEPS))
    run(watched, attached(watched)[0], range(STEPS))
    assert_equal_bits(trainable(watched), trainable(plain))


@EVERY
def test_after_detach_the_sizes_stay_and_training_goes_on(method, make_bert):
    model = ready(method, make_bert())
    optimizer, scheduler = attached(model)
    run(model, optimizer, range(3))
    early = CASES[method.name].early
    with pytest.warns(UserWarning, match=early) if early else nullcontext():
        scheduler.detach()
    before = trainable(model)
    run(model, optimizer, range(3, STEPS))
    assert scheduler.step == 3
    assert {n: p.shape for n, p in trainable(model).items()} == {n: p.shape for n, p in before.items()}
    assert not [name for name, p in trainable(model).items() if torch.equal(p, before[name])]


@EVERY
def test_a_training_that_lacks_what_the_method_does_is_told_so(method, make_bert):
    model = adapted(method, make_bert()).train()
    expected = pytest.warns(UserWarning, match=f"{method.title} and no scheduler attached")
    with expected if method.policy is not None else nullcontext():
        for _ in range(50):
            model(**batch(0, rows=1)).loss.backward()


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, fused=True),
    "AdamW one by one": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, foreach=False),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@EVERY
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_usual_optimizers_train_it(method, make_bert, make):
    model = ready(method, make_bert())
    before = ranks_of(method, model)
    optimizer, scheduler = attached(model, make([p for p in model.parameters() if p.requires_grad]))
    run(model, optimizer, range(STEPS))
    assert_done(method, model, scheduler, before)


@EVERY
def test_accumulated_micro_batches_are_the_whole_batch(method, make_bert):
    ends = []
    for parts in (1, 2):
        model = ready(method, make_bert().double()).double()
        optimizer, scheduler = attached(model)
        for step in range(STEPS):
            whole = batch(step)
            for part in range(parts):
                rows = {key: value.chunk(parts)[part] for key, value in whole.items()}
                (model(**rows).loss / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append((scheduler.ranks, trainable(model)))
    (ranks, wanted), (others, found) = ends
    assert others == ranks
    for name, parameter in wanted.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-6, atol=1e-9)


@EVERY
def test_clipping_above_all_gradients_changes_no_bit_and_below_them_something(method, make_bert):
    ends = []
    for bound in (None, 1e6, 1e-3):
        model = ready(method, make_bert())
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer, _ = attached(model, torch.optim.SGD(parameters, lr=0.1))
        for step in range(STEPS):
            model(**batch(step)).loss.backward()
            if bound is not None:
                clip_grad_norm_(parameters, bound)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(trainable(model))
    assert_equal_bits(ends[1], ends[0])
    assert any(
        not torch.equal(ends[2][name], p) for name, p in ends[0].items() if ends[2][name].shape == p.shape
    )


def scaled_step(model, optimizer, scaler, step, overflow=False):
    loss = model(**batch(step)).loss
    scaler.scale(loss * (math.inf if overflow else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@EVERY
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_a_loss_scaler_changes_rounding_alone(method, make_bert, fused):
    plain, scaled = (ready(method, make_bert().double()).double() for _ in range(2))
    ends = []
    for model, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cpu", init_scale=1024.0))):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer, scheduler = attached(
            model, torch.optim.AdamW(parameters, lr=0.02, fused=fused), scaler=scaler
        )
        for step in range(STEPS):
            if scaler is None:
                run(model, optimizer, [step])
            else:
                scaled_step(model, optimizer, scaler, step)
        ends.append(scheduler.ranks)
    assert ends[0] == ends[1]
    wanted = trainable(plain)
    for name, parameter in trainable(scaled).items():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-5, atol=1e-7)


@EVERY
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_a_step_whose_gradients_overflow_leaves_everything(method, make_bert, fused):
    model = ready(method, make_bert())
    parameters = [p for p in model.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, scheduler = attached(model, torch.optim.AdamW(parameters, lr=0.02, fused=fused), scaler=scaler)
    # The step after it would grow.
    scaled_step(model, optimizer, scaler, 0)
    before = trainable(model)
    scaled_step(model, optimizer, scaler, 1, overflow=True)
    assert scheduler.step == 1
    assert_equal_bits(trainable(model), before)
    for step in range(2, STEPS + 2):
        scaled_step(model, optimizer, scaler, step)
    assert all(torch.isfinite(p).all() for p in trainable(model).values())


@EVERY
def test_a_closure_gives_the_bits_of_a_plain_step(method, make_bert):
    plain, closed = (ready(method, make_bert()) for _ in range(2))
    run(plain, attached(plain)[0], range(STEPS))
    optimizer, _ = attached(closed)

    for step in range(STEPS):

        def closure(step=step):
            optimizer.zero_grad()
            loss = closed(**batch(step)).loss
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_equal_bits(trainable(closed), trainable(plain))


@EVERY
def test_a_step_without_gradients_is_none(method, make_bert):
    model = ready(method, make_bert())
    optimizer, scheduler = attached(model)
    before = trainable(model)
    optimizer.step()
    assert scheduler.step == 0
    assert_equal_bits(trainable(model), before)


@EVERY
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", ""])
def test_checkpointing_gives_the_same_gradients(method, make_llama, tokens, reentrant):
    collected = []
    for checkpointing in (False, True):
        model = adapted(
            method,
            make_llama(),
            target_modules=["q_proj", "o_proj"],
            rank_pattern={},
            init_lora_weights=False,
            lora_dropout=0.2,
        ).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(tokens, labels=tokens).loss.backward()
        collected.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(collected[1], collected[0], rtol=1e-4, atol=1e-6)


@EVERY
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", ""])
def test_a_checkpointed_training_does_all_that_the_method_does(method, make_bert, reentrant):
    model = ready(method, make_bert())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = ranks_of(method, model)
    optimizer, scheduler = attached(model)
    run(model, optimizer, range(STEPS))
    assert_done(method, model, scheduler, before)


@EVERY
def test_autocast_trains_it(method, make_bert):
    model = ready(method, make_bert())
    before, start = ranks_of(method, model), trainable(model)
    optimizer, scheduler = attached(model)
    for step in range(STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_done(method, model, scheduler, before)
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    # What is masked whole may stay 0.
    assert not [n for n, p in trainable(model).items() if p.any() and torch.equal(p, start[n])]


@EVERY
def test_the_adapter_that_is_named_is_trained_and_another_stays(method, make_bert):
    model = ready(method, make_bert())
    model.add_adapter("second", config_of(method, **CASES[method.name].training))
    model.set_adapter("second")
    before = {name: p.clone() for name, p in model.named_parameters() if ".default." in name}
    optimizer, scheduler = attached(model, adapter_name="second")
    run(model, optimizer, range(STEPS))
    after = dict(model.named_parameters())
    assert before
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert scheduler.ranks == ranks_of(method, model, "second")


@EVERY
def test_a_saved_adapter_is_trained_on(method, make_bert, tmp_path):
    model = ready(method, make_bert())
    optimizer, scheduler = attached(model)
    run(model, optimizer, range(STEPS))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_bert(), tmp_path, is_trainable=True).train()
    assert ranks_of(method, loaded) == scheduler.ranks
    before = trainable(loaded)
    optimizer, scheduler = attached(loaded)
    run(loaded, optimizer, range(STEPS))
    assert scheduler.ranks == ranks_of(method, loaded)
    # A closed gate may stay so.
    assert not [n for n, p in trainable(loaded).items() if before[n].any() and torch.equal(p, before[n])]


@EVERY
def test_a_copy_of_a_model_in_training_is_trained_by_itself(method, make_bert):
    model = ready(method, make_bert())
    optimizer, scheduler = attached(model)
    run(model, optimizer, range(5))
    twin = copy.deepcopy(model)
    before = trainable(twin)
    run(model, optimizer, range(5, STEPS))
    assert_equal_bits(trainable(twin), before)
    other, again = attached(twin)
    run(twin, other, range(5, STEPS))
    assert again.ranks == ranks_of(method, twin)
    assert scheduler.ranks == ranks_of(method, model)


# What attach refuses.


@EVERY
def test_a_second_attach_is_refused_with_the_way_out(method, make_bert):
    model = ready(method, make_bert())
    optimizer, _ = attached(model)
    with pytest.raises(ValueError, match=r"attached.*detach\(\)"):
        attached(model, optimizer)


@EVERY
def test_an_optimizer_without_the_adapters_parameters_is_refused_by_module(method, make_bert):
    model = ready(method, make_bert())
    other = torch.optim.AdamW(make_bert().parameters())
    with pytest.raises(ValueError, match=r"optimizer: it does not hold .*query.*get_peft_model"):
        attached(model, other)


@EVERY
def test_an_unknown_adapter_is_refused_with_those_there_are(method, make_bert):
    model = ready(method, make_bert())
    with pytest.raises(ValueError, match=r"adapter_name='third'.*\['default'\]"):
        attached(model, adapter_name="third")


@EVERY
def test_a_merged_adapter_is_refused_with_the_way_out(method, make_bert):
    model = ready(method, make_bert())
    optimizer = optimizer_of(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged.*unmerge_adapter\(\)"):
        attached(model, optimizer)


@EVERY
def test_what_is_no_optimizer_is_refused_by_its_type(method, make_bert):
    model = ready(method, make_bert())
    with pytest.raises(TypeError, match=r"optimizer: a list is not a torch\.optim\.Optimizer"):
        attached(model, list(model.parameters()))


# Trainer.


def trainer_of(method, base, folder, callbacks, **arguments):
    model = ready(method, base, task_type="SEQ_CLS", lora_dropout=0.1)
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "warmup_steps": 2,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "seed": 11,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**(defaults | arguments)),
        train_dataset=Rows(64),
        eval_dataset=Rows(8),
        callbacks=callbacks,
    )


WAYS = {
    "evaluation between": {"eval_strategy": "steps", "eval_steps": 3},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"bf16": True},
}


@EVERY
@pytest.mark.parametrize("way", WAYS)
def test_trainer_does_all_that_the_method_does(method, make_bert, tmp_path, way):
    callback = IncreLoraCallback()
    trainer = trainer_of(method, make_bert(), tmp_path, [callback], **WAYS[way])
    before, start = ranks_of(method, trainer.model), trainable(trainer.model)
    trainer.train()
    assert callback.scheduler.step == trainer.state.global_step == STEPS
    assert_done(method, trainer.model, callback.scheduler, before)
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logged] == [4, 8, 12]
    assert all(math.isfinite(log["loss"]) for log in logged)
    after = trainable(trainer.model)
    assert not [name for name, p in after.items() if p.any() and torch.equal(p, start[name])]


@EVERY
def test_the_callback_of_a_method_that_does_nothing_changes_nothing(method, make_bert, tmp_path):
    if CASES[method.name].acts:
        pytest.skip("it does something")
    ends = []
    for callbacks in ([], [IncreLoraCallback()]):
        trainer = trainer_of(method, make_bert(), tmp_path, callbacks)
        trainer.train()
        ends.append(trainable(trainer.model))
    assert_equal_bits(*ends)


@EVERY
def test_a_trainer_trains_again_after_it_has_trained(method, make_bert, tmp_path):
    callback = IncreLoraCallback()
    trainer = trainer_of(method, make_bert(), tmp_path, [callback])
    trainer.train()
    before = trainable(trainer.model)
    trainer.train()
    assert callback.scheduler.ranks == ranks_of(method, trainer.model)
    after = trainable(trainer.model)
    assert not [name for name in after if before[name].any() and torch.equal(after[name], before[name])]


class Reporter(TrainerCallback):
    """What a reporting integration does: listens to the log."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


@EVERY
def test_a_log_of_ranks_has_every_module(method, make_bert, tmp_path, monkeypatch):
    reporter = Reporter()
    monkeypatch.setattr(
        transformers.trainer, "get_reporting_integration_callbacks", lambda report_to: [reporter]
    )
    trainer = trainer_of(method, make_bert(), tmp_path, [IncreLoraCallback(log_ranks=True)])
    trainer.train()
    last = [logs for logs in reporter.logs if "loss" in logs][-1]
    told = {key.partition("/rank/")[2]: value for key, value in last.items() if "/rank/" in key}
    assert told == ranks_of(method, trainer.model)
