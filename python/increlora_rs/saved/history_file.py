"""The history of ranks beside a saved adapter: written when it is saved, read back for pictures."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..layers.found import adapted_layers
from ..support.history import GrowthHistory
from ..support.names import short
from .reading import read

HISTORY_NAME = "increlora_history.json"
_VERSION = 1


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
        history = _part(model_or_adapter_dir, adapter_name, ranks)
        if history is None:
            raise ValueError(
                "model_or_adapter_dir: there is no history of the model's ranks: they have not changed in "
                "this process. Train it, or give the directory that save_pretrained wrote after the training."
            )
        return history
    file = Path(model_or_adapter_dir) / HISTORY_NAME
    if not file.is_file():
        raise ValueError(
            f"model_or_adapter_dir: {file} does not exist: the adapter was saved before its ranks grew, "
            "after it was loaded from elsewhere, or by a release that kept no history. Call save_pretrained "
            "on the model that was trained, or give one of its Trainer's checkpoints."
        )
    history = _from_json(file).until(ranks, masked=adapter.config.method.structure.masks)
    if history is None:
        raise ValueError(
            f"model_or_adapter_dir: {file} tells of other ranks than the adapter beside it has: it was left "
            "by another training. Remove it, or save into an empty directory."
        )
    return history


def write_history(model: nn.Module, adapter_name: str, folder: Path) -> None:
    """Writes the history of the model's adapter to ``folder``, if its ranks have grown."""
    layers = adapted_layers(model, adapter_name)
    ranks = {short(name): layer.acting_rank(adapter_name) for name, layer in layers.items()}
    history = _part(model, adapter_name, ranks)
    if history is not None:
        (folder / HISTORY_NAME).write_text(_to_json(history))


def _part(model: nn.Module, adapter_name: str, ranks: dict[str, int]) -> GrowthHistory | None:
    layer = next(iter(adapted_layers(model, adapter_name).values()), None)
    history = None if layer is None else layer.probes[adapter_name].history
    # An earlier checkpoint may have been loaded since, with smaller ranks.
    return None if layer is None or history is None else history.until(ranks, masked=layer.structure.masks)


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
            None if saved["budget"] is None else int(saved["budget"]),
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
