"""The tool that tries a build of the extension under other versions of torch (`python -m torches`)."""

import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from increlora_rs import _core, _torch_check

from torches import __main__ as tool
from torches import place, symbols, table
from torches.dwarf import Types
from torches.layout import differences, digest

ROOT = Path(__file__).parents[2]
SOURCE = """
enum class Kind : unsigned char { First, Second = 7 };
namespace outer {
struct Base { virtual ~Base(); virtual void one(); virtual void two() const; long number; };
struct Held { int a[3]; Kind kind; };
union Either { double d; char c; };
struct Elsewhere { int unreached; };
struct Reached : Base {
  static int not_in_it;
  Held held;
  Held *far;
  Elsewhere *away;
  unsigned low : 3, high : 5;
  Either either;
  struct { short s; } inside;
};
struct Other { int unreached; };
struct Roots { Reached *reached; };
}
outer::Roots roots;
outer::Other other;
outer::Elsewhere elsewhere;
"""


@pytest.fixture(scope="module")
def layout_of(tmp_path_factory):
    """``layout_of(text)``: what ``outer::Roots`` points at, in C++ of that text."""

    def run(text):
        folder = tmp_path_factory.mktemp("layout")
        (folder / "x.cpp").write_text(text)
        command = [*shlex.split(os.environ.get("CXX", "c++")), "-g", "-O0", "-c", "-femit-class-debug-always"]
        subprocess.run([*command, "x.cpp", "-o", "x.o"], cwd=folder, check=True)
        return Types(folder / "x.o").pointed_at_by("outer::Roots")

    return run


@pytest.fixture(scope="module")
def plain(layout_of):
    return layout_of(SOURCE)


def test_the_layout_is_of_what_is_pointed_at_and_what_lies_in_it(plain):
    assert {"outer::Reached", "outer::Base", "outer::Held", "outer::Either", "Kind"} <= plain.keys()
    assert not {"outer::Other", "outer::Elsewhere", "outer::Roots"} & plain.keys()


def test_the_layout_has_sizes_places_numbers_and_the_order_of_virtual_functions(plain):
    assert plain["outer::Held"] == ["size 16", "at 0: a: array 2 int", "at 12: kind: Kind"]
    assert plain["Kind"] == ["size 1", "First = 0", "Second = 7"]
    assert plain["outer::Either"] == ["size 8", "at 0: d: double", "at 0: c: char"]
    reached = plain["outer::Reached"]
    assert reached[:5] == [
        "size 72",
        "at 0: inheritance: outer::Base",
        "at 16: held: outer::Held",
        "at 32: far: pointer outer::Held",
        "at 40: away: pointer outer::Elsewhere",
    ]
    assert any("3 bits: low: unsigned int" in line for line in reached)
    assert not any("not_in_it" in line for line in reached)
    assert [line.split(":")[-1].strip() for line in plain["outer::Base"] if "virtual" in line][-2:] == [
        "_ZN5outer4Base3oneEv",
        "_ZNK5outer4Base3twoEv",
    ]


@pytest.mark.parametrize(
    ("was", "now", "where"),
    [
        ("int a[3]; Kind kind;", "Kind kind; int a[3];", "outer::Held"),
        ("int a[3];", "int a[4];", "outer::Held"),
        ("Second = 7", "Second = 8", "Kind"),
        (
            "virtual void one(); virtual void two() const;",
            "virtual void two() const; virtual void one();",
            "Base",
        ),
        ("low : 3, high : 5", "low : 4, high : 4", "outer::Reached"),
        ("short s;", "char s;", "outer::Reached"),
    ],
)
def test_whatever_moves_is_a_difference(layout_of, plain, was, now, where):
    changed = layout_of(SOURCE.replace(was, now))
    assert any(where in line for line in differences(plain, changed))
    assert digest(plain) != digest(changed)


def test_an_enumerator_more_is_no_difference(layout_of, plain):
    changed = layout_of(SOURCE.replace("Second = 7", "Third, Second = 7"))
    assert differences(plain, changed) == []
    assert any("Third" in line for line in differences(changed, plain))


def test_what_lies_elsewhere_makes_no_difference(layout_of, plain):
    changed = layout_of(SOURCE.replace("int unreached", "long unreached"))
    assert differences(plain, changed) == []
    assert digest(plain) == digest(changed)


def test_what_the_extension_takes_from_torch_is_there():
    version = torch.__version__.split("+")[0]
    taken = symbols.taken(Path(_core.__file__), place.place(version))
    assert "THPVariable_Wrap" in "".join(taken)
    assert any("TensorImpl" in name for name in taken)
    assert not any(name.startswith(("Py", "memcpy", "_ZSt")) for name in taken)


def test_a_symbol_that_is_gone_fails_the_trial_by_name(monkeypatch):
    here = place.place(torch.__version__.split("+")[0])
    there = symbols.offered(here)
    gone = next(name for name in sorted(symbols.taken(Path(_core.__file__), here)) if "TensorImpl" in name)
    monkeypatch.setattr(tool, "offered", lambda under: there - {gone})
    with pytest.raises(tool.Failed, match=f"1 of \\d+ symbols are not there:\n{gone}"):
        tool._tried(Path(_core.__file__), here, replace(here, version="9.9.0"))


def test_the_tool_reads_the_mark_that_the_package_reads():
    assert table.built_for(Path(_core.__file__)) == _torch_check.built_for()


def test_a_trial_takes_the_place_of_the_earlier_one_of_its_versions(tmp_path):
    path = tmp_path / "torches.json"
    rows = [
        {"built_for": "2.13.0", "torch": version, "tests": 1} for version in ("2.9.0", "2.13.0", "2.15.0")
    ]
    path.write_text(json.dumps(rows))
    table.enter(path, {"built_for": "2.13.0", "torch": "2.14.1", "tests": 2})
    table.enter(path, {"built_for": "2.13.0", "torch": "2.9.0", "tests": 3})
    found = [(trial["torch"], trial["tests"]) for trial in table.trials(path)]
    assert found == [("2.9.0", 3), ("2.13.0", 1), ("2.14.1", 2), ("2.15.0", 1)]
    assert len(path.read_text().splitlines()) == 6


def test_the_page_shows_the_table():
    page = table.PAGE.read_text()
    assert table.rendered(table.trials(), page) == page
    assert page.count("\n| 2.13.0 | 2.1") == sum(trial["built_for"] == "2.13.0" for trial in table.trials())


def test_the_route_to_an_older_torch_refuses_a_version_that_it_is_not_for():
    done = subprocess.run(
        [ROOT / "torches" / "older.sh", "2.13.0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "2.11 and 2.12" in done.stderr
