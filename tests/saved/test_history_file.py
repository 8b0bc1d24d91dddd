"""The history of the ranks: kept in training, across resumes, beside the saved adapter."""

import copy
import itertools
import json
import math

import increlora_rs
import peft
import pytest
import torch
from growing import growing
from increlora_rs import growth_history
from increlora_rs.saved.history_file import HISTORY_NAME

STEPS = [4, 6, 8, 10]


@pytest.fixture
def trained(train_bert):
    return train_bert()


def test_history_has_ranks_and_scores_of_all_modules_at_every_growth(train_bert):
    model, optimizer, scheduler = train_bert(2)
    ranks, scores = [list(scheduler.ranks.values())], []
    for step in STEPS:
        train_bert(step, model, optimizer)
        ranks.append(list(scheduler.ranks.values()))
        scores.append(list(scheduler.scores.values()))
    train_bert(12, model, optimizer)
    history = growth_history(model)
    assert history.modules == list(scheduler.ranks)
    assert (history.budget, history.step, history.steps) == (12, 12, STEPS)
    assert [history.first_ranks, *history.ranks] == ranks
    assert history.scores == scores
    assert len({tuple(row) for row in scores}) == 4


def test_history_agrees_with_the_schedulers_rows(trained):
    model, _, scheduler = trained
    history = growth_history(model)
    before = dict(zip(history.modules, history.first_ranks, strict=True))
    rows = []
    for step, ranks, scores in zip(history.steps, history.ranks, history.scores, strict=True):
        for name, rank, score in zip(history.modules, ranks, scores, strict=True):
            if rank != before[name]:
                rows.append((step, name, rank, score))
            before[name] = rank
    assert sorted(rows) == sorted(scheduler.history.tolist())


def test_the_modules_of_highest_score_are_those_that_grew(trained):
    history = growth_history(trained[0])
    for (before, after), scores in zip(
        itertools.pairwise([history.first_ranks, *history.ranks]), history.scores, strict=True
    ):
        grew = {k for k in range(4) if after[k] > before[k]}
        assert grew == set(sorted(range(4), key=lambda k: -scores[k])[:2])


@pytest.mark.parametrize("when", ["attached", "detached"])
def test_saved_adapter_has_the_history_of_its_model(trained, tmp_path, when):
    model, _, scheduler = trained
    if when == "detached":
        scheduler.detach()
    model.save_pretrained(tmp_path)
    saved, kept = growth_history(tmp_path), growth_history(model)
    assert saved.scores != []
    for found, wanted in zip(saved.scores, kept.scores, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    saved.scores = kept.scores
    assert saved == kept


def test_named_adapter_has_its_history_in_its_folder(trained, tmp_path):
    model, _, _ = trained
    model.add_adapter("other", growing(target_modules=["key"], r=2))
    model.save_pretrained(tmp_path)
    assert growth_history(tmp_path).steps == STEPS
    assert not (tmp_path / "other" / HISTORY_NAME).exists()


def test_adapter_that_is_not_saved_leaves_no_history(trained, tmp_path):
    model, _, _ = trained
    model.add_adapter("other", growing(target_modules=["key"], r=2))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert list(tmp_path.glob(f"**/{HISTORY_NAME}")) == []


def test_copy_of_the_model_has_the_history(trained):
    model, _, _ = trained
    assert growth_history(copy.deepcopy(model)) == growth_history(model)


def test_configuration_is_saved_without_the_history(trained, tmp_path):
    model, _, _ = trained
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["growth"] is None
    assert not any("history" in name for name in config)


@pytest.mark.parametrize("stop", [2, 6, 12])
@pytest.mark.parametrize("attached_first", [True, False])
def test_history_after_a_resume_is_that_of_the_uninterrupted_training(
    train_bert, make_bert, tmp_path, stop, attached_first
):
    whole, _, _ = train_bert()
    model, optimizer, _ = train_bert(stop)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = peft.PeftModel.from_pretrained(make_bert(), tmp_path / "adapter", is_trainable=True)
    fresh = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=5e-3)
    if attached_first:
        train_bert(0, resumed, fresh)
    fresh.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train_bert(12, resumed, fresh)
    assert growth_history(resumed) == growth_history(whole)


def test_unknown_scores_are_saved_and_read(train_bert, tmp_path):
    model, _, _ = train_bert(6)
    growth_history(model).scores[0][1] = math.nan
    model.save_pretrained(tmp_path)
    scores = growth_history(tmp_path).scores
    assert [[math.isnan(score) for score in row] for row in scores] == [
        [False, True, False, False],
        [False] * 4,
    ]


def test_second_training_without_growth_keeps_the_history(trained, train_bert):
    model, _, scheduler = trained
    scheduler.detach()
    kept = growth_history(model)
    _, _, again = train_bert(4, model)
    assert len(again.history) == 0
    assert growth_history(model) == kept


def test_earlier_adapter_loaded_into_the_model_has_its_part_of_the_history(train_bert, tmp_path):
    model, _, scheduler = train_bert(6)
    model.save_pretrained(tmp_path / "early")
    scheduler.detach()
    model, _, scheduler = train_bert()
    scheduler.detach()
    model.load_adapter(tmp_path / "early", "default")
    model.save_pretrained(tmp_path / "best")
    history = growth_history(tmp_path / "best")
    assert (history.steps, history.step) == ([4, 6], 8)


def test_history_of_another_training_in_the_directory_is_refused(trained, train_bert, tmp_path):
    trained[0].save_pretrained(tmp_path)
    trained[2].detach()
    model, _, _ = train_bert(1, r=1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{HISTORY_NAME} tells of other ranks"):
        growth_history(tmp_path)


def test_model_that_has_not_grown_says_so(make_bert):
    model = peft.get_peft_model(make_bert(), growing(target_modules=["query"]))
    with pytest.raises(ValueError, match="have not changed in this process"):
        growth_history(model)


def test_directory_without_history_says_how_to_get_it(make_bert, tmp_path):
    peft.get_peft_model(make_bert(), growing(target_modules=["query"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{HISTORY_NAME} does not exist.*Trainer's checkpoints"):
        growth_history(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda saved: saved.update(version=2), "version 2"),
        (lambda saved: saved.pop("modules"), "modules"),
        (lambda saved: saved["growths"][0]["ranks"].pop(), r"lists are of \[3, 4\] modules"),
        (lambda saved: saved.update(growths=3), "not iterable"),
    ],
)
def test_damaged_history_is_named(trained, tmp_path, change, told):
    trained[0].save_pretrained(tmp_path)
    saved = json.loads((tmp_path / HISTORY_NAME).read_text())
    change(saved)
    (tmp_path / HISTORY_NAME).write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=rf"{HISTORY_NAME} is not a history of ranks.*{told}"):
        growth_history(tmp_path)


def test_history_is_public():
    assert increlora_rs.GrowthHistory is type(increlora_rs.support.history.GrowthHistory(["a"], 1, [1]))
