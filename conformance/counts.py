"""How many tests of each family passed, were skipped or failed as expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

#: The families of PEFT's tests, by file.
FAMILIES = {
    "test_custom_models": "custom models",
    "test_decoder_models": "decoder",
    "test_encoder_decoder_models": "encoder-decoder",
    "test_seq_classifier": "sequence classification",
    "test_feature_extraction_models": "feature extraction",
    "test_config": "config",
    "test_low_level_api": "low-level API",
    "test_torch_compile": "torch.compile",
}


class Counts:
    """Outcomes by family: ``{"decoder": {"passed": 9, "failed": 0, "skipped": {reason: 2}, ...}}``."""

    def __init__(self) -> None:
        self.by_family: dict[str, dict[str, Any]] = {}

    def add(self, report: pytest.TestReport) -> None:
        """Counts a test once: when it was called, or when its setup or teardown says that it did not run."""
        family = FAMILIES[Path(report.location[0]).stem]
        counts = self.by_family.setdefault(family, no_outcomes())
        if report.failed:
            counts["failed"] += 1
        elif hasattr(report, "wasxfail"):
            _count(counts["xfailed"], report.wasxfail.removeprefix("reason: "))
        elif report.skipped:
            _count(counts["skipped"], reason_of_skip(report))
        elif report.when == "call":
            counts["passed"] += 1


def no_outcomes() -> dict[str, Any]:
    """Of a family before its first test."""
    return {"passed": 0, "failed": 0, "skipped": {}, "xfailed": {}}


def reason_of_skip(report: pytest.TestReport) -> str:
    """The words of a skip, without pytest's own before them."""
    assert isinstance(report.longrepr, tuple)
    words: str = report.longrepr[2]
    return words.removeprefix("Skipped: ")


def _count(counts: dict[str, int], reason: str) -> None:
    counts[reason] = counts.get(reason, 0) + 1
