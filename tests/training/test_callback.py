"""IncreLoraCallback in transformers.Trainer: schedule, logs, resume."""

import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
import transformers
from growing import growing
from increlora_rs import IncreLoraCallback, IncreLoraConfig, growth_history
from increlora_rs.training.modules import adapted_modules
from rows import Rows
from transformers import Trainer, TrainerCallback, TrainingArguments

TARGETS = ["query", "value", "intermediate.dense"]
STEPS = 24


@pytest.fixture
def make_trainer(make_bert, tmp_path):
    """Builds a Trainer of 24 steps on a tiny BERT with a fresh adapter at rank 1."""

    def build(form=growing, callbacks=None, config=None, dtype=torch.float32, **arguments):
        torch.manual_seed(4)
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "warmup_steps": 3,
            "logging_steps": 4,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 11,
        }
        settings = {
            "task_type": "SEQ_CLS",
            "r": 3,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "target_modules": TARGETS,
            "tinit": 4,
            "deltaT": 4,
            "top_h": 4,
        }
        model = peft.get_peft_model(make_bert().to(dtype), form(**(settings | (config or {}))))
        callback = IncreLoraCallback()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**(defaults | arguments)),
            train_dataset=Rows(64),
            eval_dataset=Rows(8),
            callbacks=[callback] if callbacks is None else callbacks,
        )
        return trainer, callback

    return build


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_config_and_callback_are_enough(make_trainer):
    trainer, callback = make_trainer(config={"tinit": None, "deltaT": None, "top_h": None})
    trainer.train()
    assert callback.scheduler.total_rank == callback.scheduler.budget == 18
    assert callback.scheduler.schedule.tinit == STEPS // 20


@pytest.mark.parametrize("stop", [2, 8, 16])
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_training_from_nothing_resumes_bit_for_bit(make_trainer, task, stop):
    """With a classifier that is trained along, and with nothing else that learns."""
    config = {"init_r": 0, "top_h": 6, "task_type": task, "importance_window": 2}
    arguments = {"save_strategy": "steps", "save_steps": stop, "warmup_steps": 0}
    whole, callback = make_trainer(config=config, **arguments)
    whole.train()
    assert callback.scheduler.total_rank == callback.scheduler.budget
    resumed, _ = make_trainer(config=config, **arguments)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{stop}")
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_warm_up_of_the_learning_rate_counts_every_step_from_nothing(make_trainer, clip):
    trainer, callback = make_trainer(config={"init_r": 0, "task_type": None}, max_grad_norm=clip)
    trainer.train()
    assert callback.scheduler.step == STEPS


def test_every_training_log_has_total_rank_and_orth_reg(make_trainer):
    trainer, callback = make_trainer()
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logged] == [4, 8, 12, 16, 20, 24]
    assert [log["total_rank"] for log in logged] == [6, 10, 14, 18, 18, 18]
    assert logged[-1]["orth_reg"] == pytest.approx(callback.scheduler.orth_reg)


class Reporter(TrainerCallback):
    """What a reporting integration does: listens to the log."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


@pytest.fixture
def reporter(monkeypatch):
    """Stands in the next Trainer where TensorBoard and Weights & Biases do."""
    reporter = Reporter()
    monkeypatch.setattr(
        transformers.trainer, "get_reporting_integration_callbacks", lambda report_to: [reporter]
    )
    return reporter


def of_training(logs):
    return [(step, log) for step, log in logs if "loss" in log]


@pytest.mark.parametrize("times", [1, 2])
def test_reporting_integrations_hear_total_rank_and_orth_reg(make_trainer, reporter, times):
    trainer, _ = make_trainer()
    assert trainer.callback_handler.callbacks.index(reporter) == 1
    for _ in range(times):
        reporter.logs.clear()
        trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    heard = of_training(reporter.logs)
    assert [step for step, _ in heard] == [4, 8, 12, 16, 20, 24]
    assert [log["total_rank"] for _, log in heard] == [log["total_rank"] for log in logged]
    assert [log["orth_reg"] for _, log in heard] == [log["orth_reg"] for log in logged]
    assert not any(key.startswith("increlora/") for _, log in heard for key in log)


def test_log_ranks_reports_rank_and_score_of_every_module(make_trainer, reporter):
    callback = IncreLoraCallback(log_ranks=True)
    trainer, _ = make_trainer(callbacks=[callback])
    trainer.train()
    heard = of_training(reporter.logs)
    assert len(heard) == 6
    for _, log in heard:
        ranks = {name: log[f"increlora/rank/{name}"] for name in callback.scheduler.ranks}
        assert sum(ranks.values()) == log["total_rank"]
        assert sum(key.startswith("increlora/") for key in log) == 12
        assert all(isinstance(value, (int, float)) for value in log.values())
    last = heard[-1][1]
    assert {n: last[f"increlora/rank/{n}"] for n in callback.scheduler.ranks} == callback.scheduler.ranks
    assert {n: last[f"increlora/score/{n}"] for n in callback.scheduler.scores} == callback.scheduler.scores
    rows = callback.scheduler.history
    at_8 = dict(heard)[8]
    for row in rows[rows["step"] == 8]:
        assert at_8[f"increlora/rank/{row['module']}"] == row["rank"]
        assert at_8[f"increlora/score/{row['module']}"] == row["importance"]


@pytest.mark.parametrize("order", ["passed", "added later"])
def test_ranks_of_modules_are_neither_printed_nor_kept(make_trainer, reporter, capsys, order):
    callback = IncreLoraCallback(log_ranks=True)
    trainer, _ = make_trainer(callbacks=[callback] if order == "passed" else [])
    if order == "added later":
        trainer.add_callback(callback)
    trainer.train()
    assert "increlora/rank" in str(reporter.logs)
    printed = capsys.readouterr().out
    assert "total_rank" in printed
    assert "increlora/" not in printed + str(trainer.state.log_history)


def test_progress_bars_are_opened_once(make_trainer, reporter, monkeypatch):
    opened = []
    begin = transformers.ProgressCallback.on_train_begin

    def counted(self, *args, **kwargs):
        opened.append(self)
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(transformers.ProgressCallback, "on_train_begin", counted)
    trainer, _ = make_trainer(callbacks=[], disable_tqdm=False)
    trainer.add_callback(IncreLoraCallback(log_ranks=True))
    trainer.train()
    assert len(opened) == 1


def test_the_other_callbacks_keep_their_order(make_trainer, reporter):
    trainer, callback = make_trainer()
    before = [c for c in trainer.callback_handler.callbacks if c is not callback]
    trainer.train()
    trainer.train()
    after = trainer.callback_handler.callbacks
    assert [c for c in after if c in before] == before
    assert len(after) == len(before) + 2


def test_a_callback_outside_of_a_handler_works_at_its_place(make_trainer):
    trainer, callback = make_trainer(callbacks=[])
    trainer.create_optimizer()
    trainer.state.max_steps = 24
    callback.on_train_begin(
        trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=trainer.optimizer
    )
    logs = {"loss": 1.0}
    callback.on_log(trainer.args, trainer.state, trainer.control, logs=logs)
    assert logs["total_rank"] == 6
    callback.on_train_end(trainer.args, trainer.state, trainer.control)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_gets_the_scalars(make_trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = IncreLoraCallback(log_ranks=True)
    trainer, _ = make_trainer(callbacks=[callback], report_to="tensorboard")
    trainer.train()
    (file,) = Path(trainer.args.output_dir).glob("runs/*/events*")
    events = EventAccumulator(str(file))
    events.Reload()
    total = [(event.step, event.value) for event in events.Scalars("train/total_rank")]
    assert total == [(4, 6), (8, 10), (12, 14), (16, 18), (20, 18), (24, 18)]
    for name, rank in callback.scheduler.ranks.items():
        assert events.Scalars(f"train/increlora/rank/{name}")[-1].value == rank
        assert len(events.Scalars(f"train/increlora/score/{name}")) == 6


def test_log_ranks_must_be_true_or_false():
    with pytest.raises(TypeError, match="log_ranks='yes'"):
        IncreLoraCallback(log_ranks="yes")


def test_a_checkpoint_has_the_history_so_far(make_trainer):
    trainer, _ = make_trainer(save_strategy="steps", save_steps=8)
    trainer.train()
    history = growth_history(Path(trainer.args.output_dir) / "checkpoint-8")
    assert (history.steps, history.step) == ([8], 8)
    whole = growth_history(trainer.model)
    assert (whole.steps, whole.step) == ([8, 12, 16], 24)
    assert whole.ranks[:1] == history.ranks


def test_an_evaluation_log_holds_nothing_of_ours(make_trainer):
    trainer, _ = make_trainer(eval_strategy="steps", eval_steps=8)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(logged) == 3
    assert all("total_rank" not in log for log in logged)


@pytest.mark.parametrize("form", [growing, IncreLoraConfig.paper])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_evaluation_loss_is_the_task_loss_alone(make_trainer, form, accumulation):
    trainer, _ = make_trainer(form, gradient_accumulation_steps=accumulation)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    rows = torch.utils.data.default_collate([trainer.eval_dataset[i] for i in range(8)])
    with torch.no_grad():
        assert loss == pytest.approx(trainer.model.eval()(**rows).loss.item(), rel=1e-5)


def test_the_learning_rate_warm_up_comes_from_the_trainer(make_trainer):
    trainer, callback = make_trainer(warmup_steps=0.25, lr_scheduler_type="cosine")
    trainer.train()
    assert callback.scheduler.policy.plan.lr_warmup_steps == 6
    assert callback.scheduler.policy.plan.lr_schedule == "follow"


def test_the_scheduler_is_detached_after_training(make_trainer):
    trainer, callback = make_trainer(IncreLoraConfig.paper)
    trainer.train()
    modules = adapted_modules(trainer.model, "default")
    assert not modules[0].layer.probes["default"].attached
    assert [module.rows for module in modules] == list(callback.scheduler.ranks.values())


def test_training_twice_goes_on(make_trainer):
    trainer, callback = make_trainer()
    trainer.train()
    trainer.train()
    assert callback.scheduler.total_rank == 18


def test_a_model_without_an_adapter_raises_before_the_first_step(make_bert, tmp_path):
    trainer = Trainer(
        model=make_bert(),
        args=TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to="none", disable_tqdm=True),
        train_dataset=Rows(8),
        callbacks=[IncreLoraCallback()],
    )
    with pytest.raises(ValueError, match="0 trainable adapters of increlora_rs"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [growing, IncreLoraConfig.paper])
@pytest.mark.parametrize("stop", [3, 8, 9, 20])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(make_trainer, form, dtype, stop):
    options = {"save_strategy": "steps", "save_steps": stop, "save_total_limit": None, "dtype": dtype}
    whole, uninterrupted = make_trainer(form, **options)
    whole.train()
    for checkpoint in Path(whole.args.output_dir).glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{stop}":
            shutil.rmtree(checkpoint)
    resumed, callback = make_trainer(form, **options)
    resumed.train(resume_from_checkpoint=True)
    expected = weights(whole)
    for name, parameter in weights(resumed).items():
        assert torch.equal(parameter, expected[name]), name
    assert callback.scheduler.ranks == uninterrupted.scheduler.ranks
    assert callback.scheduler.history.tolist() == uninterrupted.scheduler.history.tolist()


@pytest.mark.parametrize("stop", [3, 8, 11])
def test_a_resumed_training_along_the_gradient_to_a_number_of_parameters_is_the_uninterrupted_one(
    make_trainer, stop
):
    ways = {
        "importance": "gradient",
        "budget_unit": "parameters",
        "top_h": None,
        "growth_end": 1.0,
    }
    options = {"save_strategy": "steps", "save_steps": stop, "save_total_limit": None, "config": ways}
    whole, uninterrupted = make_trainer(**options)
    whole.train()
    for checkpoint in Path(whole.args.output_dir).glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{stop}":
            shutil.rmtree(checkpoint)
    resumed, callback = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    for name, parameter in weights(resumed).items():
        assert torch.equal(parameter, weights(whole)[name]), name
    assert callback.scheduler.history.tolist() == uninterrupted.scheduler.history.tolist()
    assert 0 <= callback.scheduler.budget - callback.scheduler.spent < 32 + 32 + 1


def test_a_resume_inside_an_epoch_with_accumulation_is_the_uninterrupted_training(make_trainer):
    options = {"save_strategy": "steps", "save_steps": 10, "gradient_accumulation_steps": 3}
    whole, uninterrupted = make_trainer(**options)
    whole.train()
    shutil.rmtree(Path(whole.args.output_dir) / "checkpoint-20")
    shutil.rmtree(Path(whole.args.output_dir) / "checkpoint-24")
    resumed, callback = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    expected = weights(whole)
    for name, parameter in weights(resumed).items():
        assert torch.equal(parameter, expected[name]), name
    assert callback.scheduler.history.tolist() == uninterrupted.scheduler.history.tolist()


def test_a_checkpoint_without_optimizer_state_continues_with_a_warning(make_trainer):
    options = {"save_strategy": "steps", "save_steps": 10}
    first, _ = make_trainer(**options)
    first.train()
    checkpoint = Path(first.args.output_dir) / "checkpoint-10"
    (checkpoint / "optimizer.pt").unlink()
    resumed, callback = make_trainer(**options)
    with pytest.warns(UserWarning, match="checkpoint without the scheduler's state"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert callback.scheduler.total_rank == 18


def test_load_best_model_at_end_gives_back_an_earlier_smaller_adapter(make_trainer):
    trainer, _ = make_trainer(
        eval_strategy="steps",
        eval_steps=8,
        save_strategy="steps",
        save_steps=8,
        load_best_model_at_end=True,
        metric_for_best_model="step",
        greater_is_better=False,
    )
    trainer.compute_metrics = lambda _: {"step": trainer.state.global_step}
    trainer.train()
    ranks = [module.rank for module in adapted_modules(trainer.model, "default")]
    assert sum(ranks) == 10
    logged = [log for log in trainer.state.log_history if "eval_loss" in log and log["step"] == 8]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[0]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_training(make_trainer, reentrant):
    plain, callback = make_trainer(config={"lora_dropout": 0.0})
    plain.train()
    checkpointed, other = make_trainer(
        config={"lora_dropout": 0.0},
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    checkpointed.train()
    expected = weights(plain)
    assert callback.scheduler.ranks == other.scheduler.ranks
    for name, parameter in weights(checkpointed).items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "options",
    [{"bf16": True, "use_cpu": True}, {"optim": "adamw_torch"}, {"optim": "sgd"}, {"optim": "adafactor"}],
)
def test_training_arguments_of_precision_and_optimizer_work(make_trainer, options):
    trainer, callback = make_trainer(**options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*optimizer state starts anew")
        trainer.train()
    assert callback.scheduler.total_rank == callback.scheduler.budget
    assert all(torch.isfinite(parameter).all() for parameter in weights(trainer).values())


def test_forgetting_the_callback_is_noticed(make_trainer):
    trainer, _ = make_trainer(callbacks=[], max_steps=60)
    with pytest.warns(UserWarning, match="IncreLoraCallback"):
        trainer.train()


def test_a_learning_rate_schedule_of_the_users_own_is_followed(make_trainer):
    trainer, callback = make_trainer(warmup_steps=0)
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=5e-3)
    trainer.optimizer = optimizer
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer.train()
    assert not callback.scheduler.policy.warmup.was_linear


def test_trainers_own_linear_schedule_is_taken_for_linear(make_trainer):
    trainer, callback = make_trainer()
    trainer.train()
    assert callback.scheduler.policy.warmup.was_linear


def test_an_interrupted_training_can_be_followed_by_another(make_trainer):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    first, _ = make_trainer()
    first.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    callback = IncreLoraCallback()
    second = Trainer(
        model=first.model, args=first.args, train_dataset=first.train_dataset, callbacks=[callback]
    )
    second.train()
    assert callback.scheduler.total_rank == 18


def test_before_the_first_step_the_log_says_what_the_adapter_can_hold(make_trainer, caplog):
    trainer, _ = make_trainer()
    with caplog.at_level("INFO", logger="increlora_rs.training"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records]
    # A component takes in + out + 1 numbers.
    modules = adapted_modules(trainer.model, "default")
    numbers = 3 * sum(m.layer.in_features + m.layer.out_features + 1 for m in modules)
    assert said[0].startswith(f"{numbers:,} trained parameters can hold some ")
    assert "64 labels" in said[0]
