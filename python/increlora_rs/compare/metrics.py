"""The official metrics of the tasks (GLUE's), and the one number that learning rates are chosen by."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .tasks import Task

# By the task's name in small letters without hyphens; every other task has its kind's.
_OFFICIAL = {
    "cola": ("matthews",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
}
_CLASSES, _SCORES = ("accuracy",), ("pearson", "spearman")


def official(task: Task) -> tuple[str, ...]:
    """Names of the task's metrics: GLUE's for a task of GLUE, else accuracy, or Pearson's and Spearman's
    correlation for scores."""
    if task.is_regression:
        return _SCORES
    return _OFFICIAL.get(task.name.lower().replace("-", ""), _CLASSES)


def headline(metrics: dict[str, float]) -> float:
    """The mean of a task's official metrics, as GLUE's score takes it."""
    return float(np.mean(list(metrics.values())))


def measure(names: tuple[str, ...], outputs: npt.NDArray[Any], gold: npt.NDArray[Any]) -> dict[str, float]:
    """The metrics ``names`` of a model's ``outputs``.

    Args:
        outputs: (rows, classes), or (rows, 1) for scores.
        gold: (rows,): class numbers or scores. F1 is that of class 1.

    Raises:
        ImportError: scikit-learn or SciPy is not installed.
    """
    return {name: _MEASURES[name](outputs, gold) for name in names}


def _matthews(outputs: npt.NDArray[Any], gold: npt.NDArray[Any]) -> float:
    return float(_sklearn().matthews_corrcoef(gold, outputs.argmax(1)))


def _f1(outputs: npt.NDArray[Any], gold: npt.NDArray[Any]) -> float:
    return float(_sklearn().f1_score(gold, outputs.argmax(1), pos_label=1, zero_division=0))


def _accuracy(outputs: npt.NDArray[Any], gold: npt.NDArray[Any]) -> float:
    return float((outputs.argmax(1) == gold).mean())


def _pearson(outputs: npt.NDArray[Any], gold: npt.NDArray[Any]) -> float:
    return _correlation("pearsonr", outputs, gold)


def _spearman(outputs: npt.NDArray[Any], gold: npt.NDArray[Any]) -> float:
    return _correlation("spearmanr", outputs, gold)


_MEASURES = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def _correlation(name: str, outputs: npt.NDArray[Any], gold: npt.NDArray[Any]) -> float:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError('compare needs SciPy: pip install "increlora_rs[compare]"') from error
    predicted = outputs[:, 0]
    # A constant prediction, or one that is no number, correlates with nothing.
    if not np.isfinite(predicted).all() or np.ptp(predicted) == 0.0:
        return 0.0
    return float(getattr(stats, name)(predicted, gold).statistic)


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ImportError('compare needs scikit-learn: pip install "increlora_rs[compare]"') from error
    return metrics
