"""Methods of one size: the ranks that make them as large as LoRA, what they cost, and what is told."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from comparing import lines, save_tokenizer
from increlora_rs.cli import main
from increlora_rs.compare import memory
from increlora_rs.compare.base_model import BaseModel
from increlora_rs.compare.equal import adapted_in, beside, lora_of_rank_1, size_like_lora
from increlora_rs.compare.methods import Setting, parse_methods
from increlora_rs.compare.results import read_results, run_id
from increlora_rs.compare.session import Plan, Session
from increlora_rs.compare.summary import summarise
from increlora_rs.compare.tasks import read_task
from increlora_rs.compare.training import count_parameters, final_ranks
from increlora_rs.methods import METHODS
from peft import get_peft_model
from rich.console import Console

ALIKE = ["query", "key", "value", "attention.output.dense"]
OF_LORA = 2 * 8 * 64


@pytest.fixture(scope="module")
def encoder(make_bert, tmp_path_factory):
    """A BERT of 2 layers, whose attention projections are of 32 to 32."""
    folder = tmp_path_factory.mktemp("encoder")
    make_bert().save_pretrained(folder)
    save_tokenizer(folder, pad=True)
    return folder


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "reviews.tsv"
    path.write_text(lines(38))
    return path


@pytest.fixture(scope="module")
def model(encoder, task_file):
    return BaseModel(encoder), read_task(task_file)


def setting(targets, r=2):
    return Setting(r, 100, 0, {"lora_alpha": 16.0, "lora_dropout": 0.0, "target_modules": targets})


def sizes(model, targets, methods="all", r=2):
    adapted = adapted_in(lora_of_rank_1(*model, targets))
    return {
        str(method): size_like_lora(method, setting(targets, r), adapted) for method in parse_methods(methods)
    }


def trained(model, method, targets, size, r):
    """What the method trains from the start, counted in a model."""
    base, task = model
    (parsed,) = parse_methods(method)
    chosen = replace(setting(targets, r), sized=size.options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(base.classifier(task, 0), parsed.prepare(chosen).config)
    return count_parameters(adapted, final_ranks(adapted))["held"]


def test_all_stands_for_lora_and_each_of_our_methods_among_others():
    assert [str(m) for m in parse_methods("all")] == ["lora", *(method.name for method in METHODS)]
    assert [str(m) for m in parse_methods("paper,all")][:2] == ["paper", "lora"]
    with pytest.raises(ValueError, match="each once"):
        parse_methods("all,lora")
    with pytest.raises(ValueError, match="'all' is unknown"):
        parse_methods("all", ["lora"])


def test_every_method_is_as_large_as_lora_to_within_half_a_rank_of_its_own(model):
    found = sizes(model, ALIKE)
    assert {size.of_lora for size in found.values()} == {OF_LORA}
    assert {name: (size.options.get("r"), size.numbers) for name, size in found.items()} == {
        "lora": (None, OF_LORA),
        # A component has an E.
        "increlora": (2, 2 * 8 * 65),
        "adalora_rs": (2, 2 * 8 * 65),
        "sora": (2, 2 * 8 * 65),
        # 32 and 32 are its inner sizes.
        "lora_mini": (2, OF_LORA),
        # 32 + 32 / 4 + 4 heads + 2 layers + 4 kinds: 50 for each rank, 20 ranks for 1,024.
        "lorta": (20, 1000),
        "melora": (2, OF_LORA),
        # sqrt(2 (32 + 32)) is 11.3.
        "mora": (2, 8 * 11**2),
        "prilora": (2, OF_LORA),
    }
    assert str(found["lorta"]) == "r=20, 1,000 parameters, -2.3 % beside LoRA's"
    assert found["increlora"].options == {"r": 2, "budget_unit": "parameters"}


@pytest.mark.parametrize("targets", [ALIKE, "all-linear"])
def test_the_numbers_are_those_of_a_model(model, targets):
    methods = "all" if targets == ALIKE else "lora,adalora,lora_mini,melora,mora:mora_type=6,prilora,sora"
    found = sizes(model, targets, methods, r=3)
    for name, size in found.items():
        if not size.ends:
            assert trained(model, name, targets, size, r=3) == size.numbers, name
    assert found["lora"].numbers == found["lora"].of_lora
    # Those whose ranks end at a budget: LoRA's numbers, and an E for each component.
    modules = len(adapted_in(lora_of_rank_1(*model, targets)).sites)
    of_budgets = [size.numbers for size in found.values() if size.ends]
    assert of_budgets and set(of_budgets) == {found["lora"].of_lora + 3 * modules}


def test_lora_mini_doubles_its_halves_where_no_rank_within_them_is_enough(model):
    found = sizes(model, ALIKE, "lora_mini", r=40)["lora_mini"]
    # Of halves of 32 the largest rank, 32, has 2,048 numbers a module, and LoRA 40 * 64.
    assert (found.options, found.numbers) == ({"r": 20, "lora_a": 64, "lora_b": 64}, found.of_lora)


def test_a_size_that_no_rank_reaches_is_the_nearest_there_is(model):
    name = "lora_mini:lora_a=4,lora_b=4"
    size = sizes(model, ALIKE, name)[name]
    assert (size.options, size.numbers) == ({"r": 4}, 8 * 4 * 8)
    assert str(size) == "r=4, 256 parameters, -75.0 % beside LoRA's"


def test_a_rank_of_its_own_is_left_to_a_method(model):
    (size,) = sizes(model, ALIKE, "melora:r=5").values()
    assert (size.options, size.numbers) == ({}, 8 * 5 * 64)


def test_a_method_that_cannot_adapt_the_modules_says_which_it_can(model):
    with pytest.raises(ValueError, match="--methods lorta") as told:
        sizes(model, "all-linear")
    assert "intermediate.dense" in str(told.value)
    assert f"Give --targets {','.join(ALIKE)}, which it can adapt, or leave lorta out" in str(told.value)
    assert sizes(model, ALIKE, "lorta")["lorta"].numbers == 1000


@pytest.fixture
def command(encoder, task_file, tmp_path):
    def build(methods="all", targets=ALIKE):
        base = ["compare", "--model", encoder, "--task", task_file, "--out", tmp_path / "runs.jsonl"]
        base += ["--methods", methods, "--epochs", 1, "--batch", 5, "--max-length", 8, "--lr", "0.01"]
        return [str(part) for part in [*base, "--seeds", 1, "--targets", ",".join(targets)]]

    return build


def test_a_comparison_that_cannot_be_is_told_before_anything_is_trained(command, tmp_path, capsys):
    assert main(command(targets=["all-linear"])) == 1
    assert "--methods lorta" in capsys.readouterr().err
    assert (tmp_path / "runs.jsonl").read_text() == ""


@pytest.mark.slow
def test_all_methods_are_trained_at_one_size_with_their_costs_and_not_again(command, tmp_path, capsys):
    assert main(command()) == 0
    out = tmp_path / "runs.jsonl"
    runs = {run["config"]["method"]: run for run in map(json.loads, out.read_text().splitlines())}
    assert list(runs) == ["lora", *(method.name for method in METHODS)]
    for name, run in runs.items():
        assert run["status"] == "done", (name, run["error"])
        assert run["config"]["equal"] == "parameters"
        assert run["size"]["lora"] == OF_LORA
        assert abs(run["size"]["own"] / OF_LORA - 1) < 0.06, name
        # Of models as small as these it may be within the pages that the process has.
        assert isinstance(run["peak_bytes"], int), name
    assert runs["lorta"]["config"]["sized"] == {"r": 20}
    assert runs["lorta"]["parameters"]["held"] == runs["lorta"]["size"]["own"] == 1000
    assert runs["adalora_rs"]["size"]["own"] == runs["adalora_rs"]["parameters"]["adapter"] == 16 * 65
    assert runs["adalora_rs"]["parameters"]["held"] == 24 * 65
    assert "r=2 mora: r=2, 968 parameters, -5.5 % beside LoRA's" in capsys.readouterr().out
    page = out.with_suffix(".md").read_text()
    assert "| method | r | own r | size | lr |" in page and "| peak MB |" in page
    assert "| lorta | 2 | 20 | -2.3 % |" in page and "| lora | 2 | 2 | +0.0 % |" in page
    (chart,) = tmp_path.glob("runs-reviews-*-costs.png")
    assert chart.name in page and chart.read_bytes().startswith(b"\x89PNG")
    kept = out.read_text()
    assert main(command()) == 0
    assert out.read_text() == kept


# Ids.

RECORDED = Path(__file__).parents[2] / "docs" / "evidence" / "minilm.jsonl"
GROWN = "increlora:importance=gradient", "increlora:growth_end=0.6,importance=sensitivity"
KEPT = ("lora", "rslora", "adalora", "paper", "increlora", *GROWN)


def made_session(plan, base):
    return Session(plan, base, None, retry_failed=False, console=Console(quiet=True))


@pytest.mark.parametrize("name", KEPT)
def test_recorded_runs_keep_their_ids(name):
    records = [run for run in read_results(RECORDED) if run["config"]["method"] == name]
    assert len(records) >= 10
    (method,) = parse_methods(name)
    found = 0
    for record in records:
        config = record["config"]
        rows = [None] * (record["steps"] // config["epochs"] * config["batch"])
        task = SimpleNamespace(name=config["task"], digest=config["data"], train=rows)
        own = ("task", "data", "model", "method", "options", "r", "lr", "seed")
        shared = {name: value for name, value in config.items() if name not in own}
        plan = Plan([task], [method], [config["r"]], [config["lr"]], 1, 1, shared)
        session = made_session(plan, SimpleNamespace(digest=config["model"]))
        made = session._config(task, config["r"], method, config["lr"], config["seed"], {})
        found += run_id(made) == record["id"]
    assert found == len(records)


def test_what_gives_a_run_its_size_tells_it_apart(model):
    base, task = model
    shared = {"epochs": 1, "batch": 8, "max_length": 8, "precision": "float32", "target_modules": ALIKE}
    shared |= {"lora_alpha": 16.0, "lora_dropout": 0.0}
    (method,) = parse_methods("lora_mini")
    made = {}
    for equal in ("ranks", "parameters"):
        session = made_session(Plan([task], [method], [2], [0.1], 1, 1, shared, equal), base)
        session.prepare()
        made[equal] = session._config(task, 2, method, 0.1, 0, {})
    ranks, parameters = made.values()
    assert not {"equal", "sized"} & ranks.keys()
    assert {name: parameters[name] for name in ("equal", "sized")} == {
        "equal": "parameters",
        "sized": {"r": 2, "lora_a": 32, "lora_b": 32},
    }
    # The size is there once.
    assert parameters["options"] == {
        name: value for name, value in ranks["options"].items() if name not in ("lora_a", "lora_b")
    }


# Memory.


def touch(megabytes):
    return np.ones(megabytes * 10**6, dtype=np.uint8)


def test_the_peak_is_that_of_the_steps_with_the_model_and_without_evaluations(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    earlier = touch(70)
    peak = memory.PeakMemory()
    model = touch(40)
    for step in (60, 50):
        peak.on_epoch_begin(None, None, None)
        touch(step)
        peak.on_epoch_end(None, None, None)
        touch(200)
    assert len(earlier) + len(model) == 110 * 10**6
    assert 95e6 < peak.bytes < 130e6


def test_where_the_system_does_not_tell_the_peak_is_empty(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none" / "clear_refs")
    peak = memory.PeakMemory()
    peak.on_epoch_begin(None, None, None)
    peak.on_epoch_end(None, None, None)
    assert peak.bytes is None


# The table.


def made_up(method, peak=None, sized=None, own=100):
    equal = {} if sized is None else {"equal": "parameters", "sized": sized}
    config = {"task": "RTE", "method": method, "options": {}, "r": 2, "lr": 0.1, "seed": 0, "epochs": 1}
    config |= {"batch": 8, "max_length": 16, "precision": "float32", "base_dropout": None, "limit": None}
    record = {
        "id": run_id(config | equal),
        "status": "done",
        "config": config | equal,
        "epochs": [{"accuracy": 0.5}],
        "test": None,
        "parameters": {"adapter": own, "held": own, "head": 6},
        "ranks": {"a": 2},
        "total_rank": 2,
        "seconds_a_step": 0.1,
    }
    return (
        record
        | ({} if peak is None else {"peak_bytes": peak})
        | ({} if sized is None else {"size": {"own": own, "lora": 100}})
    )


def columns(records):
    (comparison,) = summarise(records)
    header, rows = comparison.cells()
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_a_run_from_before_has_an_empty_peak_and_a_table_of_them_none():
    assert "peak MB" not in columns([made_up("lora")])["lora"]
    both = columns([made_up("lora"), made_up("increlora", peak=123_400_000)])
    assert (both["lora"]["peak MB"], both["increlora"]["peak MB"]) == ("", "123")
    assert "size" not in both["lora"]


def test_sizes_are_beside_loras_and_runs_of_equal_ranks_in_a_table_of_their_own():
    found = columns([made_up("lora", sized={}), made_up("lorta", sized={"r": 9}, own=97)])
    assert (found["lora"]["own r"], found["lora"]["size"]) == ("2", "+0.0 %")
    assert (found["lorta"]["r"], found["lorta"]["own r"], found["lorta"]["size"]) == ("2", "9", "-3.0 %")
    assert len(summarise([made_up("lora"), made_up("lora", sized={})])) == 2
    assert beside(103, 100) == "+3.0 %"


def test_a_method_with_a_scale_of_its_own_keeps_it():
    (mora, other, lora) = parse_methods("mora,mora:lora_alpha=4,lora_mini")
    setting = Setting(2, 100, 0, {"lora_alpha": 16.0, "lora_dropout": 0.0, "target_modules": ["query"]})
    assert mora.prepare(setting).config.lora_alpha is None
    assert other.prepare(setting).config.lora_alpha == 4
    assert lora.prepare(setting).config.lora_alpha == 16.0
    assert mora.resolved(setting)["lora_alpha"] is None
