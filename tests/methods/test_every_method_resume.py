"""A training of every method that was interrupted goes on bit for bit: from an optimizer's state, from a
Trainer's checkpoint, in one process and in two."""

import io
import sys

import peft
import pytest
import torch
from increlora_rs import IncreLoraCallback, attach
from increlora_rs.methods import METHODS
from launches import WORKERS, torchrun
from method_cases import (
    CASES,
    EVERY,
    adapted,
    adapted_modules,
    assert_equal_bits,
    optimizer_of,
    ranks_of,
    ready,
    run,
    start_of,
    trainable,
)
from rows import Rows
from transformers import Trainer, TrainingArguments

STOP, STEPS = 5, 12
sys.path.insert(0, str(WORKERS))

import every_method  # noqa: E402


def through_a_file(state):
    """A state as a checkpoint gives it back, without code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def attached(model):
    torch.manual_seed(12)
    optimizer = optimizer_of(model)
    return optimizer, attach(model, optimizer, total_steps=STEPS)


def resumed_from_files(method, base, path, state, attach_first):
    """Model and optimizer of a new run, made of what an earlier one has saved."""
    model = peft.PeftModel.from_pretrained(base, path, is_trainable=True).train()
    # What a new process has drawn is not what the first one had.
    torch.manual_seed(99)
    optimizer = optimizer_of(model)
    if attach_first:
        attach(model, optimizer, total_steps=STEPS)
        optimizer.load_state_dict(state)
    else:
        optimizer.load_state_dict(state)
        attach(model, optimizer, total_steps=STEPS)
    return model, optimizer


@EVERY
def test_a_plain_loop_goes_on_from_adapter_and_optimizer_bit_for_bit(method, make_bert, tmp_path):
    whole, model = (adapted(method, make_bert()).train() for _ in range(2))
    run(whole, optimizer_of(whole), range(STEPS))
    optimizer = optimizer_of(model)
    run(model, optimizer, range(STOP))
    model.save_pretrained(tmp_path)
    resumed = peft.PeftModel.from_pretrained(make_bert(), tmp_path, is_trainable=True).train()
    again = optimizer_of(resumed)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    run(resumed, again, range(STOP, STEPS))
    assert_equal_bits(trainable(resumed), trainable(whole))


@EVERY
@pytest.mark.parametrize("attach_first", [True, False], ids=["attach, load", "load, attach"])
def test_an_attached_loop_goes_on_from_adapter_and_optimizer_bit_for_bit(
    method, make_bert, tmp_path, attach_first
):
    whole, model = (ready(method, make_bert()) for _ in range(2))
    optimizer, scheduler = attached(whole)
    run(whole, optimizer, range(STEPS))
    optimizer, _ = attached(model)
    run(model, optimizer, range(STOP))
    model.save_pretrained(tmp_path)
    state = through_a_file(optimizer.state_dict())
    resumed, again = resumed_from_files(method, make_bert(), tmp_path, state, attach_first)
    run(resumed, again, range(STOP, STEPS))
    assert_equal_bits(trainable(resumed), trainable(whole))
    assert ranks_of(method, resumed) == scheduler.ranks


@EVERY
def test_an_attached_loop_goes_on_from_state_dicts_in_a_fresh_model_bit_for_bit(method, make_bert):
    whole, model, resumed = (ready(method, make_bert()) for _ in range(3))
    run(whole, attached(whole)[0], range(STEPS))
    optimizer, _ = attached(model)
    run(model, optimizer, range(STOP))
    again, scheduler = attached(resumed)
    resumed.load_state_dict(through_a_file(model.state_dict()))
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert scheduler.step == STOP
    run(resumed, again, range(STOP, STEPS))
    assert_equal_bits(trainable(resumed), trainable(whole))


@EVERY
def test_a_running_training_goes_back_to_an_earlier_state(method, make_bert):
    model = ready(method, make_bert())
    optimizer, scheduler = attached(model)
    run(model, optimizer, range(STOP))
    weights, state = through_a_file(model.state_dict()), through_a_file(optimizer.state_dict())
    run(model, optimizer, range(STOP, STEPS))
    wanted, ranks = trainable(model), scheduler.ranks
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert scheduler.step == STOP
    run(model, optimizer, range(STOP, STEPS))
    assert scheduler.ranks == ranks
    assert_equal_bits(trainable(model), wanted)


# Trainer.


def train(method, base, folder, resume=False):
    model = ready(method, base, task_type="SEQ_CLS", lora_dropout=0.1)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            warmup_steps=2,
            save_steps=STOP,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            seed=11,
        ),
        train_dataset=Rows(64),
        callbacks=[IncreLoraCallback()],
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}") if resume else None)
    return trainer.model


@EVERY
def test_trainer_resumes_bit_for_bit_from_a_checkpoint_that_is_an_adapter(method, make_bert, tmp_path):
    whole = train(method, make_bert(), tmp_path)
    resumed = train(method, make_bert(), tmp_path, resume=True)
    assert_equal_bits(trainable(resumed), trainable(whole))
    loaded = peft.PeftModel.from_pretrained(make_bert(), tmp_path / f"checkpoint-{STEPS}")
    assert type(loaded.peft_config["default"]) is method.config


# Two processes.


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes got, of one launch for all methods and ways."""
    out = tmp_path_factory.mktemp("every_method")
    return torchrun(2, "every_method.py", out, *(method.name for method in METHODS))


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("way", ["loop", "trainer"])
def test_two_processes_have_the_same_bits(processes, method, way):
    first, second = (result[method.name] for result in processes)
    for part in ("whole", "resumed"):
        assert first[way, part]["ranks"] == second[way, part]["ranks"]
        assert_equal_bits(second[way, part]["parameters"], first[way, part]["parameters"])


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("way", ["loop", "trainer"])
def test_two_processes_resume_bit_for_bit(processes, method, way):
    result = processes[0][method.name]
    assert result[way, "resumed"]["ranks"] == result[way, "whole"]["ranks"]
    assert_equal_bits(result[way, "resumed"]["parameters"], result[way, "whole"]["parameters"])


@pytest.mark.slow
@EVERY
def test_two_processes_equal_one_with_the_averaged_loss(processes, method):
    alone, together = every_method.train_alone(method), processes[0][method.name]["loop", "whole"]
    assert alone["ranks"] == together["ranks"]
    for name, parameter in alone["parameters"].items():
        torch.testing.assert_close(together["parameters"][name], parameter, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@EVERY
def test_two_processes_do_all_that_the_method_does(processes, method, make_bert):
    for way in ("loop", "trainer"):
        ranks, does = processes[0][method.name][way, "whole"]["ranks"], CASES[method.name].ranks
        if does == "grow":
            assert sum(ranks.values()) == 3 * len(ranks)
            assert set(ranks.values()) != {3}
        else:
            layers = adapted_modules(adapted(method, make_bert()))
            wanted = {name: start_of(method, layer, name) for name, layer in layers.items()}
            assert all(rank <= wanted[name] for name, rank in ranks.items())
            assert (ranks != wanted) is (does == "fall")
