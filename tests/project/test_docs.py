"""What the documents say is true: tests and files that they name, tables of arguments, quoted messages."""

import ast
import dataclasses
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from growing import growing
from increlora_rs._core import Schedule
from increlora_rs.compare.results import read_results
from peft import AdaLoraConfig, LoraConfig

from benches import traffic

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", (DOCS / "guarantees.md").read_text())))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_each_promise_names_a_test_that_exists(file, name):
    assert re.search(rf"^(def {name}\(|{name} = )", (ROOT / "tests" / file).read_text(), re.MULTILINE)


def test_the_guarantees_name_tests_of_every_chapter():
    assert len(NAMED) > 50


PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
LINKS = [
    (path, target)
    for path in PAGES
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    if not target.startswith(("http", "#"))
]


@pytest.mark.parametrize(("page", "target"), LINKS, ids=[f"{page.name}-{target}" for page, target in LINKS])
def test_each_link_leads_to_a_file(page, target):
    assert (page.parent / target.partition("#")[0]).exists()


def test_links_are_found():
    assert len(LINKS) > 40


RUST = sorted({file for page in PAGES for file in re.findall(r"\bsrc/[\w/]+\.rs\b", page.read_text())})


@pytest.mark.parametrize("file", RUST)
def test_each_file_of_rust_that_is_named_exists(file):
    assert (ROOT / file).exists()


def test_the_tables_of_what_is_communicated_are_those_of_the_formulas():
    page = (DOCS / "distributed.md").read_text()
    for table in (traffic.steps(), traffic.holdings()):
        assert traffic.rendered(table) in page


def test_the_models_of_those_tables_have_the_sizes_that_they_are_known_for():
    assert [model.parameters for model in traffic.MODELS] == [8_030_261_248, 70_553_706_496]


# The evidence.


def test_the_tables_of_the_evidence_are_those_of_its_results():
    render = runpy.run_path(str(DOCS / "evidence" / "render.py"))
    page = (DOCS / "evidence.md").read_text()
    assert render["rendered"](page) == page
    kinds = r"<!-- (?:overview|tasks|fewer|runs|bed|curve|sizes|file)\b"
    assert page.count("<!-- end -->") == len(re.findall(kinds, page)) >= 4
    other = re.sub(r"(\| `lora` \| 2 \|) [\d.]+ ±", r"\1 0.0 ±", page, count=1)
    assert render["rendered"](other) == page != other


def test_the_figures_of_the_decoder_are_those_of_its_runs():
    page = (DOCS / "evidence.md").read_text()
    section = page.split("## A decoder\n")[1].split("\n## ")[0]
    runs = read_results(DOCS / "evidence" / "smollm2.jsonl")
    assert [run["config"]["method"] for run in runs] == ["lora", "increlora:importance=gradient"]
    figures = [metrics["accuracy"] for run in runs for metrics in [*run["epochs"], run["test"]]]
    told = [float(number) for number in re.findall(r"\b\d\d\.\d\b", section)]
    assert told == [round(100 * figure, 1) for figure in figures]


def test_the_evidence_names_methods_and_tasks_that_were_trained():
    selected = runpy.run_path(str(DOCS / "evidence" / "render.py"))["selected"]
    with pytest.raises(ValueError, match=r"no run of increlora:alpha=0\.1"):
        selected("lora,increlora:alpha=0.1", None)
    with pytest.raises(ValueError, match="no task SQuAD"):
        selected("lora", "MRPC,SQuAD")


# Tables of arguments.

STATUSES = {"works", "raises", "not yet"}


def table(page):
    """{argument: cells} of the table under "Argument by argument"."""
    chapter = (DOCS / page).read_text().partition("## Argument by argument")[2]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", chapter, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


LORA, ADALORA = table("from-lora.md"), table("from-adalora.md")
LORA_FIELDS = {field.name: field for field in dataclasses.fields(LoraConfig) if field.init}
ADALORA_FIELDS = {field.name: field for field in dataclasses.fields(AdaLoraConfig) if field.init}
# Those that AdaLoraConfig adds or gives another default, and `r`, which it does not use.
ADALORA_OWN = {
    name
    for name, field in ADALORA_FIELDS.items()
    if name not in LORA_FIELDS or repr(field.default) != repr(LORA_FIELDS[name].default)
} | {"r", "rank_pattern"}

# A value that is not the default, and what has to go with it.
ACCEPTED = {
    "task_type": {"task_type": "SEQ_CLS"},
    "auto_mapping": {"auto_mapping": {"base_model_class": "BertModel"}},
    "peft_version": {"peft_version": "0.21.0"},
    "base_model_name_or_path": {"base_model_name_or_path": "model"},
    "revision": {"revision": "main"},
    "inference_mode": {"inference_mode": True},
    "r": {"r": 4},
    "target_modules": {"target_modules": "all-linear"},
    "exclude_modules": {"exclude_modules": "classifier"},
    "lora_alpha": {"lora_alpha": 16},
    "lora_dropout": {"lora_dropout": 0.1},
    "bias": {"bias": "all"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["classifier"]},
    "init_lora_weights": {"init_lora_weights": "svd"},
    "layers_to_transform": {"layers_to_transform": [0]},
    "layers_pattern": {"layers_pattern": "layer", "layers_to_transform": [0]},
    "rank_pattern": {"rank_pattern": {"query": 2}},
    "alpha_pattern": {"alpha_pattern": {"query": 32}},
    "target_parameters": {"target_parameters": ["experts.down_proj"]},
    "init_r": {"init_r": 2},
    "tinit": {"tinit": 5},
    "deltaT": {"deltaT": 20},
    "beta1": {"beta1": 0.9},
    "beta2": {"beta2": 0.9},
    "orth_reg_weight": {"orth_reg_weight": 0.5},
    "total_step": {"total_step": 100},
}


def other_value(field):
    """A value of the argument that is not its default."""
    default = field.default
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)):
        return default + 1
    return f"{default}-other" if isinstance(default, str) else ["a value"]


def of(rows, status):
    return sorted(name for name, cells in rows.items() if cells[-2] in status)


def test_the_table_has_every_argument_of_loraconfig_and_no_other():
    assert set(LORA) == set(LORA_FIELDS)


def test_the_table_has_every_argument_that_adaloraconfig_adds():
    assert set(ADALORA) == ADALORA_OWN
    assert set(ADALORA_FIELDS) - set(ADALORA) - set(LORA) == set()


@pytest.mark.parametrize("rows", [LORA, ADALORA], ids=["LoraConfig", "AdaLoraConfig"])
def test_every_row_has_a_known_status(rows):
    assert {cells[-2] for cells in rows.values()} <= STATUSES


@pytest.mark.parametrize("name", sorted(set(of(LORA, {"works"}) + of(ADALORA, {"works"})) - {"peft_type"}))
def test_an_argument_that_works_is_taken(name):
    value = getattr(growing(**ACCEPTED[name]), name)
    assert value == ACCEPTED[name][name]
    assert value != getattr(growing(), name)


def test_the_peft_type_is_ours_whatever_is_given():
    assert growing(peft_type="LORA").peft_type == "INCRELORA"


@pytest.mark.parametrize("name", of(LORA, {"raises", "not yet"}))
def test_an_argument_that_raises_is_named(name):
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        growing(**{name: other_value(LORA_FIELDS[name])})


@pytest.mark.parametrize("name", of(ADALORA, {"raises", "not yet"}))
def test_an_argument_of_adalora_that_raises_is_named(name):
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        growing(**{name: other_value(ADALORA_FIELDS[name])})


@pytest.mark.parametrize(
    ("name", "default"), [(n, c[0]) for n, c in ADALORA.items() if re.fullmatch(r"[\d.]+", c[0])]
)
def test_adaloras_defaults_are_as_told(name, default):
    assert ADALORA_FIELDS[name].default == float(default)


# Messages that the troubleshooting page quotes.

QUOTED = re.findall(r"^> (.+(?:\n> .+)*)", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
FRAGMENTS = [
    part.strip() for quote in QUOTED for part in quote.replace("\n> ", " ").split("…") if part.strip()
]


def messages():
    """All constant parts of the package's strings."""
    for path in (ROOT / "python" / "increlora_rs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


MESSAGES = "\n".join(messages())


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_a_quoted_message_is_one_of_ours(fragment):
    assert fragment in MESSAGES


def test_messages_are_quoted():
    assert len(QUOTED) > 12


# The schedules that the page on choosing shows.

SCHEDULES = re.findall(r"^\|" + r" (\d+) \|" * 7 + "$", (DOCS / "choosing.md").read_text(), re.MULTILINE)


def test_schedules_are_shown():
    assert len(SCHEDULES) > 3


def growths(steps, **given):
    """The automatic schedule of 72 modules at r = 8, and the number of its events at which ranks grow."""
    ranks, caps, budget = np.ones(72, np.uint64), np.full(72, 768, np.uint64), 8 * 72
    schedule = Schedule(steps, ranks, caps, budget, **given)
    events = 0
    while ranks.sum() < budget:
        events += 1
        for module, components in schedule.choose(np.arange(72.0), ranks, caps, budget):
            ranks[module] += np.uint64(components)
    return schedule, events


@pytest.mark.parametrize("row", SCHEDULES)
def test_a_schedule_that_is_shown_is_the_one_made(row):
    steps, *shown = map(int, row)
    schedule, events = growths(steps)
    _, late_events = growths(steps, growth_end=0.6)
    made = [schedule.tinit, schedule.deltaT, schedule.top_h, schedule.add_r, events, late_events]
    assert made == shown
