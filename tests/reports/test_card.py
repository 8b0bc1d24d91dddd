"""The section on the adapter in the model card."""

import re
import shutil

import peft
import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraCallback
from transformers import Trainer, TrainingArguments

HEADING = "## IncreLoRA adapter"


@pytest.fixture
def model(make_bert, grow):
    adapted = peft.get_peft_model(make_bert(), growing(r=3, target_modules=["query", "value"]))
    grow(
        adapted,
        {
            "bert.encoder.layer.0.attention.self.query": 4,
            "bert.encoder.layer.0.attention.self.value": 1,
            "bert.encoder.layer.1.attention.self.query": 5,
            "bert.encoder.layer.1.attention.self.value": 2,
        },
    )
    return adapted


def card(folder):
    return (folder / "README.md").read_text()


def test_card_has_ranks_budget_and_table(model, tmp_path):
    model.save_pretrained(tmp_path)
    text = card(tmp_path)
    assert "4 modules, ranks 1 to 5, total 12 of a budget of 12 (`r=3` on average)" in text
    assert "| layer | `query` | `value` |\n| ---: | ---: | ---: |\n| 0 | 4 | 1 |\n| 1 | 5 | 2 |\n" in text


def test_code_of_the_card_loads_and_exports(model, make_bert, tokens, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "path" / "to" / "this" / "folder")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"```python\n(increlora_rs\..*?|import increlora_rs.*?)```",
        card(tmp_path / "path/to/this/folder"),
        re.DOTALL,
    )
    assert len(blocks) == 2
    names = {"base_model": make_bert()}
    for block in blocks:
        exec(block, names)
    plain = peft.PeftModel.from_pretrained(make_bert(), tmp_path / "lora")
    with torch.no_grad():
        wanted = model(tokens).logits
        torch.testing.assert_close(names["model"](tokens).logits, wanted)
        torch.testing.assert_close(plain(tokens).logits, wanted)


def test_saving_again_replaces_the_section(model, grow, tmp_path):
    model.save_pretrained(tmp_path)
    grow(model, {"bert.encoder.layer.0.attention.self.value": 3})
    model.save_pretrained(tmp_path)
    text = card(tmp_path)
    assert text.count(HEADING) == 1
    assert "| 0 | 4 | 3 |" in text
    assert "| 0 | 4 | 1 |" not in text


def test_saving_again_changes_nothing_else(model, tmp_path):
    model.save_pretrained(tmp_path)
    first = card(tmp_path)
    model.save_pretrained(tmp_path)
    assert card(tmp_path) == first


def test_text_of_the_user_stays_before_and_after_the_section(model, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nTrained on rainy days.\n")
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(card(tmp_path) + "\n## Thanks\n\nTo the rain.\n")
    model.save_pretrained(tmp_path)
    text = card(tmp_path)
    places = [
        text.index(part) for part in ("license: mit", "Trained on rainy days.", HEADING, "To the rain.")
    ]
    assert places == sorted(places)
    assert text.count(HEADING) == 1


def test_section_whose_end_the_user_removed_swallows_no_text(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(
        card(tmp_path).replace("<!-- increlora_rs: end -->", "") + "\n## Thanks\n\nTo the rain.\n"
    )
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert "To the rain." in card(tmp_path)
    assert card(tmp_path).count(HEADING) == 2


def test_many_kinds_are_listed_module_by_module(grow, tmp_path):
    names = [f"projection_{k:02}" for k in range(50)]
    layers = torch.nn.ModuleList(
        torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in names}) for _ in range(2)
    )
    model = peft.get_peft_model(torch.nn.ModuleDict({"layers": layers}), growing(r=2, target_modules=names))
    grow(model, {"layers.1.projection_07": 6})
    model.save_pretrained(tmp_path)
    text = card(tmp_path)
    assert text.count("| `layers.") == 100
    assert "| `layers.1.projection_07` | 6 |" in text
    assert text.index("<details>") < text.index("| `layers.0") < text.index("</details>")


def test_each_saved_adapter_has_a_section_with_its_folder(model, tmp_path):
    model.add_adapter("other", growing(target_modules=["key"], r=2))
    model.save_pretrained(tmp_path / "both")
    assert [line for line in card(tmp_path / "both").splitlines() if line.startswith(HEADING)] == [
        HEADING,
        f"{HEADING} `other`",
    ]
    assert '"path/to/this/folder/other"' in card(tmp_path / "both")
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert [line for line in card(tmp_path / "one").splitlines() if line.startswith(HEADING)] == [
        f"{HEADING} `other`"
    ]


def test_adapters_of_other_methods_get_no_section(make_bert, tmp_path):
    peft.get_peft_model(make_bert(), peft.LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    assert "IncreLoRA" not in card(tmp_path)


def test_card_that_trainer_writes_anew_has_the_section(model, tmp_path):
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", disable_tqdm=True),
        callbacks=[IncreLoraCallback()],
    )
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    text = card(tmp_path / "out")
    assert "generated automatically" in text
    assert text.count(HEADING) == 1
    shutil.rmtree(tmp_path / "out")
