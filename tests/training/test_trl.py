"""TRL's trainers of rewards and of policies: ranks change in them; what comes out is saved and exported."""

import pytest
import tiny
import torch
from growing import growing
from increlora_rs import IncreLoraCallback, IncreLoraConfig, export_lora
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

datasets = pytest.importorskip("datasets", reason="datasets is not installed, which TRL needs")
trl = pytest.importorskip("trl", reason="trl is not installed")

pytestmark = pytest.mark.slow
FORMS = pytest.mark.parametrize("form", [growing, IncreLoraConfig], ids=["grows", "moves"])
TARGETS = ["q_proj", "v_proj"]
PLAIN = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


@pytest.fixture
def llama(tmp_path):
    """A directory with a small Llama."""
    torch.manual_seed(0)
    tiny.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(model):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def check(model, build, tmp_path):
    """The saved adapter, its export in plain PEFT and the merged model give the model's outputs."""
    wanted = logits(model)
    assert (wanted - logits(build())).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path / "adapter")), wanted)
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(build(), tmp_path / "lora")), wanted)
    torch.testing.assert_close(logits(model.merge_and_unload()), wanted)


def changed(growth, start):
    ranks = growth.scheduler.ranks
    assert len(growth.scheduler.history) > 0
    return len(ranks) == 4 and any(rank != start for rank in ranks.values())


@FORMS
def test_a_reward_model_is_trained_saved_and_exported(form, llama, tmp_path):
    def build():
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
        model.config.pad_token_id = tiny.tokenizer().pad_token_id
        return model

    lines = tiny.sentences()
    backwards = [" ".join(reversed(line.split())) for line in lines]
    growth = IncreLoraCallback()
    trainer = trl.RewardTrainer(
        model=build(),
        args=trl.RewardConfig(
            output_dir=str(tmp_path / "checkpoints"),
            max_steps=24,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            max_length=32,
            logging_steps=8,
            **PLAIN,
        ),
        train_dataset=datasets.Dataset.from_dict({"chosen": lines, "rejected": backwards}),
        processing_class=tiny.tokenizer(),
        peft_config=form(
            task_type="SEQ_CLS", r=3, lora_alpha=6, target_modules=TARGETS, modules_to_save=["score"]
        ),
        callbacks=[growth],
    )
    trainer.train()
    assert changed(growth, 1 if form is growing else 3)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    check(trainer.model, build, tmp_path)


@FORMS
def test_three_steps_of_grpo_change_the_ranks(form, llama, tmp_path):
    growth = IncreLoraCallback()
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(llama),
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "checkpoints"),
            max_steps=3,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=6,
            learning_rate=1e-2,
            # The policy without the adapter is the reference.
            beta=0.1,
            logging_steps=1,
            **PLAIN,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": tiny.sentences()}),
        processing_class=tiny.tokenizer(),
        peft_config=form(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=TARGETS, growth_end=0.7),
        callbacks=[growth],
    )
    trainer.train()
    assert changed(growth, 1 if form is growing else 3)
    divergences = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert divergences[0] == 0.0 < divergences[-1]
    check(trainer.model, lambda: AutoModelForCausalLM.from_pretrained(llama), tmp_path)
