"""Commands in README, CONTRIBUTING and docs exist: targets of make, subcommands, options, extras."""

import re
import shlex
from pathlib import Path

import pytest
from increlora_rs.cli import _parser

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
SHELL = re.compile(r"^```(?:sh|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:make|increlora-rs|pip install) [^`]+)`")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def commands():
    """(page, words) of every command in a shell block or in the text."""
    found = {}
    for path in PAGES:
        text = path.read_text().replace("\\\n", " ")
        lines = [line for block in SHELL.findall(text) for line in block.splitlines()] + INLINE.findall(text)
        for line in lines:
            for part in " ".join(shlex.split(line, comments=True)).split(" && "):
                if part:
                    found[path.name, part] = None
    return list(found)


COMMANDS = commands()


def of(program):
    return [(page, command) for page, command in COMMANDS if command.split()[0] == program]


@pytest.mark.parametrize("program", ["make", "increlora-rs", "pip"])
def test_commands_are_found(program):
    assert len(of(program)) > 2


@pytest.mark.parametrize(("page", "command"), of("make"))
def test_make_has_the_target(page, command):
    assert command.split()[1] in TARGETS


@pytest.mark.parametrize(("page", "command"), of("increlora-rs"))
def test_the_command_line_takes_the_command(page, command):
    words = command.split()[1:]
    if len(words) == 1:
        # Named in the text, without its arguments.
        words.append("--help")
    try:
        _parser().parse_args(words)
    except SystemExit as end:
        assert end.code == 0, f"{page}: {command}"
    else:
        assert words[-1] != "--help"


@pytest.mark.parametrize(
    "name", sorted({name for path in PAGES for name in re.findall(r"\.\[(\w+)\]", path.read_text())})
)
def test_the_extra_exists(name):
    assert re.search(rf"^{name} = \[", PYPROJECT, re.MULTILINE)
