"""The pytest plugin: in PEFT's tests ``LoraConfig`` means a method's configuration; outcomes are counted."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from increlora_rs.contract.config import MethodConfig
from increlora_rs.contract.method import Method
from increlora_rs.methods import METHODS
from peft import PeftConfig

from .counts import Counts, reason_of_skip
from .expectations import expected_of
from .growth import grow_new_adapters

_NOT_OURS = "makes no LoraConfig"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--method", required=True, help="name of the method")
    parser.addoption("--grown", action="store_true", help="new adapters have grown unequally")
    parser.addoption("--counts", type=Path, help="JSON file for the counts")


def pytest_configure(config: pytest.Config) -> None:
    # The tests import the class from here: their tables of cases, their conditions and the bodies of
    # those without a table all mean ours then.
    (method,) = (method for method in METHODS if method.name == config.getoption("method"))
    peft.LoraConfig = method.config
    # It would look models up on the hub the first time; ours lie in the working directory.
    utilities: Any = importlib.import_module("peft_tests.testing_utils")
    utilities.hub_online_once = contextlib.nullcontext
    grown = config.getoption("grown")
    if grown:
        grow_new_adapters()
    conformance = _Conformance(method, "grown" if grown else "fresh", config.getoption("counts"))
    config.pluginmanager.register(conformance)


class _Conformance:
    """Selects the tests that are about LoRA, and sorts their outcomes by expectation."""

    def __init__(self, method: Method, state: str, counts_file: Path | None) -> None:
        self.config = method.config
        self.expected = expected_of(method.name)
        self.state = state
        self.counts = Counts()
        self.counts_file = counts_file
        self.trimmed: set[str] = set()
        #: The test that runs, and whether it has made a configuration of ours.
        self.running: pytest.Item | None = None
        self.made = False
        #: Configurations that were refused while a module was imported, with the refusal.
        self.refused: list[tuple[MethodConfig, str]] = []
        self.own_reasons: set[str] = set()
        self._watch_configurations()

    def _watch_configurations(self) -> None:
        check = self.config.__post_init__

        @functools.wraps(check)
        def watched(config: MethodConfig) -> None:
            self.made = True
            try:
                check(config)
            except ValueError as error:
                reason = self.expected.refusal(error)
                if self.running is not None or reason is None:
                    raise
                # One refused row of a table must not keep the module from being imported.
                self.refused.append((config, reason))

        self.config.__post_init__ = watched

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Leaves the rows of LoRA in a module's tables: there are 18,000 of other methods."""
        module = metafunc.module
        if module.__name__ not in self.trimmed:
            self.trimmed.add(module.__name__)
            for table in vars(module).values():
                if isinstance(table, list):
                    table[:] = [row for row in table if self._may_be_ours(row)]

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [item for item in items if self._may_be_ours(_parameters(item))]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
        for item in kept:
            if reason := self.expected.left_out(item.nodeid) or self._refused_argument(item):
                self.own_reasons.add(reason)
                item.add_marker(pytest.mark.skip(reason=reason))
            elif reason := self.expected.failure(item.nodeid, self.state):
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))

    def _refused_argument(self, item: pytest.Item) -> str | None:
        """Why a configuration among the test's parameters, made or to be made, is refused."""
        for value in _flat(_parameters(item)):
            config = value
            if isinstance(value, dict) and self._names_ours(_parameters(item)):
                # What is wrong with it otherwise, or that it is something else, is the test's business.
                with contextlib.suppress(ValueError, TypeError):
                    config = self.config(**value)
            for refused, reason in self.refused:
                if config is refused:
                    return reason
        return None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.running, self.made = item, False
        # What a test draws shall not depend on those before it: some compare what is rounded in two ways,
        # within a bound that PEFT's LoRA, too, misses with one or two draws of a hundred.
        torch.manual_seed(0)
        try:
            return (yield)
        finally:
            self.running = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        left_out = (
            report.skipped and not hasattr(report, "wasxfail") and reason_of_skip(report) in self.own_reasons
        )
        if not self.made and not left_out and not self._names_ours(_parameters(item)):
            if report.failed:
                _turn(report, "skipped", _NOT_OURS)
            return report
        if (
            report.failed
            and call.excinfo is not None
            and (reason := self.expected.refusal(call.excinfo.value))
        ):
            _turn(report, "skipped", reason)
        elif report.skipped and not hasattr(report, "wasxfail"):
            given = reason_of_skip(report)
            reason = given if given in self.own_reasons else self.expected.skip(given)
            if reason is None:
                _turn(report, "failed", f"a skip that is not expected: {given}")
            else:
                _turn(report, "skipped", reason)
        self.counts.add(report)
        return report

    def _names_ours(self, value: Any) -> bool:
        return self.config in _methods(value)

    def _may_be_ours(self, value: Any) -> bool:
        return not _methods(value) or self._names_ours(value)

    def pytest_sessionfinish(self) -> None:
        if self.counts_file is not None:
            self.counts_file.write_text(json.dumps(self.counts.by_family), encoding="utf-8")


def _turn(report: pytest.TestReport, outcome: Any, reason: str) -> None:
    report.outcome = outcome
    path, line, _ = report.location
    report.longrepr = (path, line or 0, reason) if outcome == "skipped" else reason


def _parameters(item: pytest.Item) -> Any:
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _methods(value: Any) -> set[type]:
    """The configuration classes that stand in a row of a table or among a test's parameters."""
    kinds = (part if isinstance(part, type) else type(part) for part in _flat(value))
    return {kind for kind in kinds if issubclass(kind, PeftConfig)}
