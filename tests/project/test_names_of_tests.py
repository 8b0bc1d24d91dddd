"""Tests, their helpers and workers are imported by their bare names, from folders that one process shares."""

from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_no_two_files_have_one_name():
    names = Counter(path.name for path in TESTS.rglob("*.py"))
    assert "llama_cpp.py" in names and "llama_server.py" in names
    assert [name for name, count in names.items() if count > 1] == []
