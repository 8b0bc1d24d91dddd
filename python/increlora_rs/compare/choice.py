"""Which learning rate is a method's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .metrics import headline
from .results import Record


def score(record: Record, part: str = "dev") -> float:
    """The mean of the official metrics on the development set at the end, by which a run is chosen; on the
    test set where ``part`` is "test"."""
    return headline(record["epochs"][-1] if part == "dev" else record["test"])


def best_lr(runs: Sequence[Record]) -> float | None:
    """The learning rate with the best mean score over the seeds that all learning rates were tried with;
    the lower one of equals; None without runs that ended well.

    Args:
        runs: Those of one method in one setting, which differ in seed and learning rate.
    """
    seeds: dict[float, dict[int, float]] = {}
    for run in runs:
        if run["status"] == "done":
            seeds.setdefault(run["config"]["lr"], {})[run["config"]["seed"]] = score(run)
    if not seeds:
        return None
    # A learning rate that failed with every seed is not there; one that failed with some has few.
    common = set.intersection(*(set(scores) for scores in seeds.values()))
    means = {
        lr: np.mean([value for seed, value in scores.items() if not common or seed in common])
        for lr, scores in seeds.items()
    }
    return max(sorted(means), key=lambda lr: means[lr])
