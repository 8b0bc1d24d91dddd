"""Which of PEFT's tests are not run, which must fail, which skips are right, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator

#: Refusals of ours that a test may run into; the reason names what was refused.
_REFUSALS = (
    (r"^(\w+)=.* is not supported by IncreLoraConfig", "`{}` raises by name"),
    (r"^init_lora_weights='(\w+)' is unknown", '`init_lora_weights="{}"` raises by name'),
    (r"a module of type (\w+) is not supported", "`{}` as a target module raises by name"),
    (r"the convolution has (groups)=\d+", "a convolution with `{}` raises by name"),
    (r"'INCRELORA' is not compatible with the `(PeftMixedModel)`", "`{}` raises by name"),
)

#: Tests that are not run.
_EXCLUDED: tuple[tuple[str, str], ...] = ()

#: Tests that must fail: state ("" for both), test, reason.
_EXPECTED_FAILURES: tuple[tuple[str, str, str], ...] = ()

#: Skips of PEFT's own: its words, and ours.
_SKIPS: tuple[tuple[str, str], ...] = ()


def refusal(error: BaseException) -> str | None:
    """The reason if ``error``, or what led to it, is a refusal of ours by name; else None."""
    for cause in _chain(error):
        for pattern, reason in _REFUSALS:
            if isinstance(cause, ValueError) and (found := re.search(pattern, str(cause))):
                return reason.format(found[1])
    return None


def excluded(test: str) -> str | None:
    """Why ``test``, a pytest id, is not run; None if it is."""
    return next((reason for pattern, reason in _EXCLUDED if re.search(pattern, test)), None)


def expected_failure(test: str, state: str) -> str | None:
    """Why ``test`` must fail in ``state``, "fresh" or "grown"; None if it must pass."""
    for when, pattern, reason in _EXPECTED_FAILURES:
        if when in ("", state) and re.search(pattern, test):
            return reason
    return None


def skip(words: str) -> str | None:
    """Our reason for a skip with the given words; None if there is no such skip."""
    return next((reason for pattern, reason in _SKIPS if re.search(pattern, words)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
