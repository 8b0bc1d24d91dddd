"""How the ranks grew: kept by the scheduler, saved beside the adapter, read back for pictures."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .model import adapted_layers, short
from .source import read

HISTORY_NAME = "increlora_history.json"
_VERSION = 1


@dataclass
class GrowthHistory:
    """Ranks and scores of all modules at every growth.

    Args:
        modules: Full module names, in model order.
        budget: Total rank that the training aims at, or number of parameters where there are ``costs``.
        first_ranks: Rank of each module before the first growth.
        steps: Optimizer step of each growth.
        ranks: For each growth, the ranks that it left, by module.
        scores: For each growth, the scores S_k that it chose by, by module; NaN where they were not kept.
        step: Optimizer steps taken.
        costs: Parameters of a component of each module, where the budget is in parameters; else None.
    """

    modules: list[str]
    budget: int
    first_ranks: list[int]
    steps: list[int] = field(default_factory=list)
    ranks: list[list[int]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    step: int = 0
    costs: list[int] | None = None

    def add(self, step: int, ranks: list[int], scores: list[float]) -> None:
        """Takes a growth in."""
        self.steps.append(step)
        self.ranks.append(ranks)
        self.scores.append(scores)
        self.step = step

    def until(self, ranks: dict[str, int]) -> GrowthHistory | None:
        """The part up to the last growth that left these ranks by module; None if none did."""
        if set(ranks) != set(self.modules):
            return None
        wanted = [ranks[name] for name in self.modules]
        for count in range(len(self.steps), 0, -1):
            if self.ranks[count - 1] == wanted:
                return GrowthHistory(
                    self.modules,
                    self.budget,
                    self.first_ranks,
                    self.steps[:count],
                    self.ranks[:count],
                    self.scores[:count],
                    self.step if count == len(self.steps) else self.steps[count],
                    self.costs,
                )
        return None

    def state(self) -> dict[str, Any]:
        """For the optimizer's checkpoint."""
        return {
            "first_ranks": list(self.first_ranks),
            "steps": list(self.steps),
            "ranks": torch.tensor(self.ranks, dtype=torch.int64),
            "scores": torch.tensor(self.scores, dtype=torch.float64),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave."""
        self.first_ranks, self.steps = list(saved["first_ranks"]), list(saved["steps"])
        self.ranks, self.scores = saved["ranks"].tolist(), saved["scores"].tolist()

    def rebuild(self, rows: list[tuple[int, int, int, float]]) -> None:
        """Takes rows of step, module, rank and score of the modules that grew: what releases kept that
        did not keep all scores. ``first_ranks`` must be right."""
        for step, k, rank, score in rows:
            if not self.steps or self.steps[-1] != step:
                before = self.ranks[-1] if self.ranks else self.first_ranks
                self.add(step, list(before), [math.nan] * len(self.modules))
            self.ranks[-1][k], self.scores[-1][k] = rank, score


def growth_history(
    model_or_adapter_dir: nn.Module | str | os.PathLike[str], adapter_name: str = "default"
) -> GrowthHistory:
    """How the ranks of a model's adapter, or of a saved one, grew.

    A model has it while it is trained and afterwards; a saved adapter, and a checkpoint of ``Trainer``,
    in its file ``increlora_history.json``.

    Raises:
        ValueError: there is no history, or not that of this adapter.
        ValueError, FileNotFoundError, TypeError: as for :func:`increlora_rs.export_lora`.
    """
    adapter = read(model_or_adapter_dir, adapter_name)
    ranks = {name: module.rank for name, module in adapter.modules.items()}
    if isinstance(model_or_adapter_dir, nn.Module):
        history = _part(adapter.config, ranks)
        if history is None:
            raise ValueError(
                "model_or_adapter_dir: there is no history of the model's ranks: they have not grown in this "
                "process. Train it, or give the directory that save_pretrained wrote after the training."
            )
        return history
    file = Path(model_or_adapter_dir) / HISTORY_NAME
    if not file.is_file():
        raise ValueError(
            f"model_or_adapter_dir: {file} does not exist: the adapter was saved before its ranks grew, "
            "after it was loaded from elsewhere, or by a release that kept no history. Call save_pretrained "
            "on the model that was trained, or give one of its Trainer's checkpoints."
        )
    history = _from_json(file).until(ranks)
    if history is None:
        raise ValueError(
            f"model_or_adapter_dir: {file} tells of other ranks than the adapter beside it has: it was left "
            "by another training. Remove it, or save into an empty directory."
        )
    return history


def write_history(model: nn.Module, adapter_name: str, folder: Path) -> None:
    """Writes the history of the model's adapter to ``folder``, if its ranks have grown."""
    ranks = {
        short(name): layer.r[adapter_name] for name, layer in adapted_layers(model, adapter_name).items()
    }
    configs: Any = model.peft_config
    history = _part(configs[adapter_name], ranks)
    if history is not None:
        (folder / HISTORY_NAME).write_text(_to_json(history))


def _part(config: Any, ranks: dict[str, int]) -> GrowthHistory | None:
    # A configuration pickled by an earlier release has no such attribute.
    history: GrowthHistory | None = getattr(config, "growth", None)
    # An earlier checkpoint may have been loaded since, with smaller ranks.
    return None if history is None else history.until(ranks)


def _to_json(history: GrowthHistory) -> str:
    growths = [
        {"step": step, "ranks": ranks, "scores": [_short(score) for score in scores]}
        for step, ranks, scores in zip(history.steps, history.ranks, history.scores, strict=True)
    ]
    head: dict[str, Any] = {
        "version": _VERSION,
        "step": history.step,
        "budget": history.budget,
        "modules": history.modules,
        "first_ranks": history.first_ranks,
    }
    if history.costs is not None:
        head["costs"] = history.costs
    return json.dumps(head | {"growths": growths})


def _short(score: float) -> float | None:
    # JSON has no NaN, and six digits are more than any picture shows.
    return float(f"{score:.6g}") if math.isfinite(score) else None


def _from_json(file: Path) -> GrowthHistory:
    try:
        saved = json.loads(file.read_text())
        if saved["version"] != _VERSION:
            raise ValueError(f"it has version {saved['version']}, this release reads {_VERSION}")
        costs = None if saved.get("costs") is None else [int(cost) for cost in saved["costs"]]
        history = GrowthHistory(
            list(saved["modules"]),
            int(saved["budget"]),
            list(saved["first_ranks"]),
            step=int(saved["step"]),
            costs=costs,
        )
        for growth in saved["growths"]:
            scores = [math.nan if score is None else float(score) for score in growth["scores"]]
            history.steps.append(int(growth["step"]))
            history.ranks.append(list(growth["ranks"]))
            history.scores.append(scores)
        lists: list[list[Any]] = [history.modules, history.first_ranks, *history.ranks, *history.scores]
        lists += [] if costs is None else [costs]
        sizes = set(map(len, lists))
        if len(sizes) != 1:
            raise ValueError(f"its lists are of {sorted(sizes)} modules")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model_or_adapter_dir: {file} is not a history of ranks: {error}.") from error
    return history
