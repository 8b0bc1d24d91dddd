"""What the documents say about the tests is true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "guarantees.md").read_text())))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_each_promise_names_a_test_that_exists(file, name):
    assert re.search(rf"^(def {name}\(|{name} = )", (ROOT / "tests" / file).read_text(), re.MULTILINE)


def test_the_guarantees_name_tests_of_every_chapter():
    assert len(NAMED) > 50


@pytest.mark.parametrize("path", ["docs/ranks.png", "examples/finetune.py", "src/adapter.rs", "LICENSE"])
def test_files_that_the_readme_shows_exist(path):
    assert (ROOT / path).is_file()
