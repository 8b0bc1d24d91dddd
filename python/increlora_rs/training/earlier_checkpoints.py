"""The states of versions 1 and 2 of a training's checkpoint, in the form of today's.

Version 1 was a dictionary, version 2 the same one as text. Both knew no other method than IncreLoRA, and held
what is its policy's beside what is every training's.
"""

from __future__ import annotations

from typing import Any

from ..support.history import GrowthHistory


def in_this_form(saved: dict[str, Any]) -> dict[str, Any]:
    """``saved`` as version 3 would have it; one of version 3 as it is."""
    if saved["version"] > 2:
        return saved
    row_births, e_births = saved["row_births"], saved["e_births"]
    same = ("step", "total_steps", "seed", "modules", "ranks", "history")
    kept = ("budget", "schedule", "was_linear", "ranks", "reserve")
    # Releases before there was a choice saved none.
    importance = saved.get("importance", "sensitivity")
    scores = saved["scores"]
    sketches = scores.get("sketches", {})
    return {
        "version": 3,
        "method": "increlora",
        **{name: saved[name] for name in same},
        "lead": saved["adam_lead"],
        "skipped": saved.get("skipped", 0),
        "births": [[rows, rows, e] for rows, e in zip(row_births, e_births, strict=True)],
        "growth": saved["growth"] if "growth" in saved else _rebuilt(saved),
        "gauge": scores["importance"] if importance == "sensitivity" else sketches.get("step"),
        "policy": {
            **{name: saved[name] for name in kept},
            "budget_unit": saved.get("budget_unit", "rank"),
            "told_unreached": bool(saved["history"]),
            "importance": importance,
            "scores": _scores(importance, scores, sketches),
        },
    }


def _scores(importance: str, scores: dict[str, Any], sketches: dict[str, Any]) -> dict[str, Any]:
    if importance == "sensitivity":
        return {name: scores[name] for name in ("mean", "uncertainty")}
    return {"sigma": scores["sigma"]} | {k: v for k, v in sketches.items() if k != "step"}


def _rebuilt(saved: dict[str, Any]) -> dict[str, Any]:
    """The history of a release that kept the scores of those modules alone that grew."""
    first_ranks = [births.count(0) for births in saved["e_births"]]
    history = GrowthHistory(saved["modules"], None, first_ranks)
    history.rebuild([(int(s), int(k), int(r), float(i)) for s, k, r, i in saved["history"]])
    return history.state()
