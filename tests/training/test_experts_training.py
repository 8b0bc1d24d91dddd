"""Trainings of experts: resume, checkpointing, Trainer, several processes, compiled functions."""

import io

import mixtures
import pytest
import torch
from adapted_experts import MORE_TARGETS, TARGETS, adapted, layers_of, optimizer_of, tokens_of, train
from increlora_rs import IncreLoraCallback, IncreLoraConfig, attach, growth_history
from launches import torchrun
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

FORMS = {
    "fluctuation": {"make": IncreLoraConfig},
    "gradient": {},
    "sensitivity": {"importance": "sensitivity"},
    "paper": {"make": IncreLoraConfig.paper},
}
every_form = pytest.mark.parametrize("form", FORMS)
STEPS = 20


def state_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "fluctuation") for name in MORE_TARGETS),
        *(("GptOss", form) for form in FORMS if form != "fluctuation"),
    ],
)
def test_ranks_change_within_the_budget(name, form):
    # Some at an event, where they grow.
    events = {} if form == "fluctuation" else {"tinit": 2, "deltaT": 2, "top_h": 3}
    model = adapted(name, target_modules=["o_proj"], **FORMS[form], **events)
    _, scheduler = train(model, STEPS)
    assert len(growth_history(model).steps) > 0
    assert set(scheduler.ranks) == set(layers_of(model))
    assert scheduler.session.policy.spent <= scheduler.budget
    assert len(set(scheduler.ranks.values())) > 1


@every_form
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(form):
    whole = adapted("Qwen3Moe", **FORMS[form])
    train(whole, STEPS)
    half = adapted("Qwen3Moe", **FORMS[form])
    optimizer, _ = train(half, STEPS // 2, total_steps=STEPS)
    file = io.BytesIO()
    torch.save([half.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    model = adapted("Qwen3Moe", **FORMS[form])
    optimizer = optimizer_of(model)
    attach(model, optimizer, total_steps=STEPS)
    for holder, state in zip((model, optimizer), torch.load(file, weights_only=True), strict=True):
        holder.load_state_dict(state)
    train(model, STEPS // 2, optimizer=optimizer, first=STEPS // 2)
    assert same(state_of(model), state_of(whole))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", ["fluctuation", "gradient"])
def test_gradient_checkpointing_changes_nothing(form, reentrant):
    plain, checkpointed = (adapted("Qwen3Moe", **FORMS[form]) for _ in range(2))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        train(model, STEPS)
    one, other = state_of(plain), state_of(checkpointed)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


class Tokens(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, number):
        tokens = tokens_of(number)[0]
        return {"input_ids": tokens, "labels": tokens}


def test_trainer_resumes_from_a_checkpoint(tmp_path):
    def trainer(model):
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=12,
            save_steps=6,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=1e-2,
        )
        return Trainer(model, arguments, train_dataset=Tokens(), callbacks=[IncreLoraCallback()])

    whole = adapted("Mixtral", make=IncreLoraConfig)
    trainer(whole).train()
    resumed = adapted("Mixtral", make=IncreLoraConfig)
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same(state_of(whole), state_of(resumed))
    assert len(growth_history(whole).steps) > 0


@pytest.mark.slow
def test_a_compiled_model_gives_what_it_gives_uncompiled(grow):
    model = adapted("Qwen3Moe")
    grow(model)
    wanted = mixtures.logits(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(mixtures.logits(compiled), wanted, rtol=1e-4, atol=1e-5)
    grow(model, dict.fromkeys(layers_of(model), 4), seed=1)
    wanted = mixtures.logits(model)
    torch.testing.assert_close(mixtures.logits(compiled), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_processes_that_see_other_experts_train_one_adapter(tmp_path):
    first, second = torchrun(2, "experts.py", tmp_path)
    assert first["ranks"] == second["ranks"]
    assert same(first["state"], second["state"])
    # Each process sees one token, and so two of the four experts, in most steps others than the other.
    assert first["seen"] != second["seen"]
    assert first["ranks"] == first["alone"]["ranks"]
    for name, value in first["alone"]["state"].items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TARGETS)
def test_generation_goes_on_from_a_cache(grow, name):
    model = adapted(name)
    grow(model)
    tokens = tokens_of(0)
    with torch.no_grad():
        whole = model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False, use_cache=False)
        cached = model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(whole, cached)
