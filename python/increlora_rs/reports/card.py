"""The section on the adapter in the model card, the README.md beside a saved adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..layers.found import adapted_layers
from ..support.names import short
from .tables import RankTable

_BEGIN = "<!-- increlora_rs: from here to the next such mark, every save writes anew -->"
_END = "<!-- increlora_rs: end -->"
# Not from a begin whose end was deleted, over the user's own text, to a later section.
_SECTION = re.compile(f"{re.escape(_BEGIN)}(?:(?!{re.escape(_BEGIN)}).)*?{re.escape(_END)}", re.DOTALL)
# Wider than this, a table of layers by kinds is no longer readable on a page.
_MOST_KINDS = 10


def write_section(card: Path, model: Any, adapters: Sequence[str]) -> None:
    """Writes to ``card`` the section on the given adapters of ``model``, in place of one that
    is there, else at the end; the other text stays."""
    lines = [line for name in adapters for line in _adapter(model, name)]
    section = "\n".join([_BEGIN, "", *lines, _END])
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    found = list(_SECTION.finditer(text))
    if found:
        text = text[: found[0].start()] + section + text[found[0].end() :]
    else:
        text = f"{text.rstrip()}\n\n{section}".lstrip()
    card.write_text(f"{text.rstrip()}\n", encoding="utf-8")


def _adapter(model: Any, name: str) -> list[str]:
    config = model.peft_config[name]
    layers = adapted_layers(model, name)
    ranks = {short(full): layer.acting_rank(name) for full, layer in layers.items()}
    sizes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    method, paper = config.method, config.method.paper
    number = paper.rpartition("/")[2]
    folder = "path/to/this/folder" + ("" if name == "default" else f"/{name}")
    title = f"## {method.title} adapter" + ("" if name == "default" else f" `{name}`")
    return [
        title,
        "",
        f"{method.summary} ([arXiv {number}]({paper})): {len(ranks)} modules, ranks "
        f"{min(ranks.values())} to {max(ranks.values())}, "
        f"{config.describe_ranks(sizes, list(ranks.values()))}.",
        "",
        "Load it onto the base model:",
        "",
        "```python",
        "import increlora_rs  # before the adapter is loaded: makes its type known to PEFT",
        "from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained(base_model, "{folder}")',
        "```",
        "",
        *(_export(folder) if config.exports else _NO_EXPORT),
        "",
        *_ranks(ranks, config.budget(sizes, ranks.values()).total),
        "",
    ]


def _export(folder: str) -> list[str]:
    return [
        "Export it, exactly, as a plain LoRA for whatever loads LoRA:",
        "",
        "```python",
        f'increlora_rs.export_lora("{folder}", "lora")',
        "```",
        "",
        f"In a shell the same is `increlora-rs export {folder} lora`.",
    ]


_NO_EXPORT = [
    "No plain LoRA does the same. For what knows no adapters of this type, merge it into the base model, by "
    "`model.merge_and_unload()`."
]


def _ranks(ranks: dict[str, int], budget: int) -> list[str]:
    table = RankTable.of(ranks, budget)
    if len(table.layers) == 1 or len(table.kinds) > _MOST_KINDS:
        rows = [f"| `{name}` | {rank} |" for name, rank in ranks.items()]
        return [*_folded(len(rows)), "| module | rank |", "| --- | ---: |", *rows, *_folded_end(len(rows))]
    lines = ["| layer | " + " | ".join(f"`{kind}`" for kind in table.kinds) + " |"]
    lines.append("| ---: |" + " ---: |" * len(table.kinds))
    for layer in table.layers:
        cells = [table.ranks.get((layer, kind)) for kind in table.kinds]
        lines.append(f"| {layer} | " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return lines


def _folded(rows: int) -> list[str]:
    return ["<details><summary>Ranks by module</summary>", ""] if rows > 40 else []


def _folded_end(rows: int) -> list[str]:
    return ["", "</details>"] if rows > 40 else []
