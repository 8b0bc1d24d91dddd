"""What 0.1.0 saved, when the factors were named ``lora_A.default``: still read, still resumed.

The files in ``fixtures`` were written by that release; ``kinds.pt`` holds the base model's numbers, the whole
``state_dict`` and an output.
"""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from every_kind import IDS, TARGETS, EveryKind
from growing import growing
from increlora_rs import IncreLoraCallback, IncreLoraConfig, export_lora, rank_table
from peft import PeftModel, get_peft_model
from rows import Rows
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

FIXTURES = Path(__file__).parents[1] / "fixtures" / "increlora_0_1_0"


@pytest.fixture(scope="module")
def kept():
    return torch.load(FIXTURES / "kinds.pt")


@pytest.fixture
def base(kept):
    model = EveryKind()
    model.load_state_dict(kept["base"])
    return model


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def test_an_adapter_gives_its_output(base, kept):
    model = PeftModel.from_pretrained(base, FIXTURES / "adapter")
    torch.testing.assert_close(model(IDS), kept["output"])


@pytest.mark.parametrize("folder", ["adapter", "checkpoint", "checkpoint_paper"])
def test_a_configuration_with_an_option_that_is_gone_loads_without_a_word(folder):
    assert "init_new" in json.loads((FIXTURES / folder / "adapter_config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IncreLoraConfig.from_pretrained(str(FIXTURES / folder))


def test_a_saved_start_that_is_gone_is_told(tmp_path):
    IncreLoraConfig(importance="gradient").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_new": "random"}))
    with pytest.warns(UserWarning, match="init_new='random' of the saved configuration"):
        assert IncreLoraConfig.from_pretrained(str(tmp_path)).follows_gradient


def test_an_adapter_loads_over_one_that_is_there(base, kept):
    model = get_peft_model(base, growing(r=2, lora_alpha=4, target_modules=TARGETS))
    model.load_adapter(FIXTURES / "adapter", "default")
    torch.testing.assert_close(model(IDS), kept["output"])


@pytest.mark.parametrize("adapter_name", [None, "old"])
def test_the_load_adapter_of_transformers_gives_pefts_output(adapter_name):
    model = bert()
    model.load_adapter(str(FIXTURES / "checkpoint"), adapter_name=adapter_name)
    peft_model = PeftModel.from_pretrained(bert(), FIXTURES / "checkpoint").eval()
    assert not torch.equal(peft_model(IDS).logits, bert()(IDS).logits)
    torch.testing.assert_close(model(IDS).logits, peft_model(IDS).logits)


def test_a_state_dict_of_the_whole_model_loads(kept):
    model = get_peft_model(EveryKind(), growing(r=2, lora_alpha=4, target_modules=TARGETS))
    model.load_state_dict(kept["state_dict"])
    torch.testing.assert_close(model(IDS), kept["output"])


def test_an_adapter_is_read_without_its_base_model(tmp_path):
    assert "lin" in str(rank_table(FIXTURES / "adapter"))
    export_lora(FIXTURES / "adapter", tmp_path)
    old = load_file(FIXTURES / "adapter" / "adapter_model.safetensors")
    lora = load_file(tmp_path / "adapter_model.safetensors")
    a, b, e = (old[f"base_model.model.lin.lora_{factor}"] for factor in "ABE")
    found = lora["base_model.model.lin.lora_B.weight"] @ lora["base_model.model.lin.lora_A.weight"]
    torch.testing.assert_close(found, 2.0 * b * e.view(-1) @ a)


@pytest.mark.parametrize(
    ("checkpoint", "form"), [("checkpoint", growing), ("checkpoint_paper", IncreLoraConfig.paper)]
)
def test_a_checkpoint_of_trainer_resumes_and_meets_the_budget(checkpoint, form, tmp_path):
    base = bert()
    config = form(
        task_type="SEQ_CLS",
        r=3,
        lora_alpha=8,
        target_modules=["query", "value"],
        tinit=4,
        deltaT=4,
        top_h=2,
    )
    callback = IncreLoraCallback()
    trainer = Trainer(
        model=get_peft_model(base, config),
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=24,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            warmup_steps=3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
        ),
        train_dataset=Rows(64),
        callbacks=[callback],
    )
    shutil.copytree(FIXTURES / checkpoint, tmp_path / "checkpoint-10")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    scheduler = callback.scheduler
    assert scheduler.restored
    assert scheduler.total_rank == scheduler.budget == 12
    first = scheduler.history[scheduler.history["step"] == 8]
    grown = json.loads((FIXTURES / checkpoint / "increlora_history.json").read_text())
    assert grown["step"] == 10 and len(first) == 2
