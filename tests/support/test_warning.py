"""A warning points to the line of the user's script that led to it, through torch, PEFT and Trainer."""

import linecache
import warnings

import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraCallback, attach
from peft import get_peft_model
from rows import Rows
from transformers import Trainer, TrainingArguments


def line_of(caught):
    (one,) = [warning for warning in caught if issubclass(warning.category, UserWarning)]
    assert one.filename == __file__
    return linecache.getline(one.filename, one.lineno).strip()


def adapted(make_plain, **config):
    settings = {"r": 2, "target_modules": ["lin0", "lin1"]} | config
    return get_peft_model(make_plain(), growing(**settings))


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def test_a_warning_of_attach_points_to_its_call(make_plain):
    model = adapted(make_plain, total_step=30)
    optimizer = adamw(model)
    with pytest.warns(UserWarning, match="total_step=30") as caught:
        attach(model, optimizer, total_steps=20)
    assert line_of(caught) == "attach(model, optimizer, total_steps=20)"


def test_a_warning_of_a_step_points_to_the_optimizers_call(make_plain):
    model = adapted(make_plain, tinit=1, deltaT=1, top_h=1)
    optimizer = adamw(model)
    # It wraps the optimizer's step in one of its own.
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    attach(model, optimizer, total_steps=20)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    with pytest.warns(UserWarning, match="importance of every module is 0") as caught:
        optimizer.step()
    assert line_of(caught) == "optimizer.step()"


def test_a_warning_of_a_load_points_to_the_optimizers_call(make_plain):
    model = adapted(make_plain)
    optimizer = adamw(model)
    state = optimizer.state_dict()
    attach(model, optimizer, total_steps=20)
    with pytest.warns(UserWarning, match="holds none of a scheduler's") as caught:
        optimizer.load_state_dict(state)
    assert line_of(caught) == "optimizer.load_state_dict(state)"


def test_a_warning_in_trainer_points_to_the_call_of_train(make_bert, tmp_path):
    config = growing(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], total_step=5)
    trainer = Trainer(
        model=get_peft_model(make_bert(), config),
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, use_cpu=True, report_to="none", disable_tqdm=True
        ),
        train_dataset=Rows(8),
        callbacks=[IncreLoraCallback()],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="total_step=5")
        trainer.train()
    assert line_of(caught) == "trainer.train()"
