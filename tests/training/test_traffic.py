"""What is communicated is what the formulas of docs/distributed.md say, counted in small trainings."""

import sys

import pytest
from launches import WORKERS, torchrun

from benches.traffic import Adapter

sys.path.insert(0, str(WORKERS))

import given

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """What each of two processes gave to collectives."""
    return torchrun(2, "given.py", tmp_path_factory.mktemp("given"))


def by_the_formula(engine, scenario, number, facts, adapter):
    """Bytes of a step."""
    in_pieces = engine in ("FSDP1", "FSDP2, adapter sharded")
    look = not in_pieces and (
        number <= 2 or facts["decides"] or (engine == "FSDP2" and number & (number - 1) == 0)
    )
    total = adapter.check() if look else 0
    if engine == "FSDP2":
        total += adapter.average()
    if in_pieces:
        total += adapter.whole()
        if facts["averaged"]:
            total += adapter.averaged()
        if facts["shrunk"]:
            total += adapter.moved_state(facts["shrunk"])
    if facts["armed"]:
        total += adapter.sketches(1) if scenario == "growing" else adapter.sensitivities()
    if facts["decides"] and scenario != "moving":
        total += adapter.choice()
        if scenario == "growing":
            total += adapter.directions(facts["grown"], 1)
    return total


@pytest.mark.parametrize(("engine", "scenario"), given.CASES)
def test_each_step_communicates_what_the_formula_says(counted, engine, scenario):
    for found in (result[engine, scenario] for result in counted):
        adapters = [Adapter(found["sizes"], facts["rows"], found["room"]) for facts in found["steps"]]
        assert sum(found["attach"].values()) == adapters[0].attach(engine)
        if engine == "FSDP2, adapter sharded":
            assert sum(found["average"].values()) == adapters[0].begun_average()
        wanted = [
            by_the_formula(engine, scenario, number, facts, adapter)
            for number, (facts, adapter) in enumerate(zip(found["steps"], adapters, strict=True), 1)
        ]
        assert [sum(facts["given"].values()) for facts in found["steps"]] == wanted
        assert any(facts["grown"] for facts in found["steps"])


def test_something_was_taken_away_in_the_capacity_form(counted):
    assert any(facts["shrunk"] for facts in counted[0]["FSDP1", "moving"]["steps"])
