"""A task: rows of one or two texts with a class or a score, read from files."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_ENDINGS = (".tsv", ".csv", ".jsonl")
_FIRST, _SECOND, _LABEL = ("text_a", "text"), "text_b", "label"
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Row:
    """One example; ``second`` is empty where the task has one text."""

    first: str
    second: str
    label: str


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: Of its folder, or of its file without the ending.
        train, dev, test: The rows; ``test`` may be empty.
        labels: The classes, in the order of their numbers; empty where labels are scores.
        digest: SHA-256 over the files, in hexadecimal.
    """

    name: str
    train: list[Row]
    dev: list[Row]
    test: list[Row]
    labels: list[str]
    digest: str

    @property
    def is_regression(self) -> bool:
        """Are the labels scores?"""
        return not self.labels

    @property
    def splits(self) -> dict[str, list[Row]]:
        """The sets of rows by name."""
        return {"train": self.train, "dev": self.dev, "test": self.test}

    def limited(self, limit: int | None) -> Task:
        """At most ``limit`` rows of each set, the same at every call; None: all."""
        if limit is None:
            return self
        train, dev, test = (
            random.Random(0).sample(rows, len(rows))[:limit] for rows in (self.train, self.dev, self.test)
        )
        return replace(self, train=train, dev=dev, test=test)

    def encoded(self, tokenizer: Any, max_length: int) -> dict[str, list[dict[str, Any]]]:
        """What Trainer takes, by set: ``input_ids``, ``attention_mask`` and ``labels`` of each row."""
        return {name: self._encode(rows, tokenizer, max_length) for name, rows in self.splits.items()}

    def _encode(self, rows: list[Row], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
        numbers = {label: number for number, label in enumerate(self.labels)}
        examples = []
        for row in rows:
            texts = (row.first, row.second) if row.second else (row.first,)
            label = float(row.label) if self.is_regression else numbers[row.label]
            examples.append({**tokenizer(*texts, truncation=True, max_length=max_length), "labels": label})
        return examples


def read_task(path: Path) -> Task:
    """The task of a folder with ``train``, ``dev`` and perhaps ``test``, or of one file.

    Files are TSV (no quoting, as GLUE's), CSV or JSONL, each perhaps with ``.gz``, with the columns
    ``text_a`` (or ``text``), ``label`` and perhaps ``text_b``. Of one file a fifth is the development
    set. Labels are scores where any is a number with a point, else classes.

    Raises:
        FileNotFoundError: ``path``, or a file of it, is missing.
        ValueError: a file cannot be read as rows; the message names file, row and column.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"--task {path} does not exist; give a folder with train and dev, or a file.")
    if path.is_dir():
        found = {name: _find(path, name) for name in ("train", "dev", "test")}
        for name in ("train", "dev"):
            if found[name] is None:
                raise FileNotFoundError(
                    f"--task {path}: there is no {name} file; give {name}.tsv, .csv or .jsonl, perhaps .gz."
                )
        files = [file for file in found.values() if file is not None]
        sets = {name: [] if file is None else _rows(file) for name, file in found.items()}
    else:
        files, rows = [path], _rows(path)
        random.Random(0).shuffle(rows)
        cut = max(1, round(_HELD_OUT * len(rows)))
        sets = {"train": rows[cut:], "dev": rows[:cut], "test": []}
    if not sets["train"] or not sets["dev"]:
        raise ValueError(f"--task {path}: no rows to learn from, or none to measure on.")
    labels = _classes([row.label for rows in sets.values() for row in rows])
    digest = hashlib.sha256(b"".join(_bytes(file) for file in files)).hexdigest()
    return Task(path.name.split(".")[0], **sets, labels=labels, digest=digest)


def _find(folder: Path, name: str) -> Path | None:
    candidates = [folder / f"{name}{ending}{packed}" for ending in _ENDINGS for packed in ("", ".gz")]
    return next((file for file in candidates if file.is_file()), None)


def _bytes(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _rows(path: Path) -> list[Row]:
    rows = []
    for number, cells in enumerate(_cells(path), start=1):
        first = next((cells[name] for name in _FIRST if cells.get(name) is not None), None)
        if first is None or cells.get(_LABEL) is None:
            missing = _LABEL if first is not None else " or ".join(_FIRST)
            raise ValueError(f"--task {path}: row {number} has no {missing}; it has {sorted(cells)}.")
        rows.append(Row(str(first), str(cells.get(_SECOND) or ""), str(cells[_LABEL])))
    return rows


def _cells(path: Path) -> Iterator[dict[str, Any]]:
    ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    text = _bytes(path).decode()
    if ending == ".tsv":
        header, *lines = text.rstrip("\n").split("\n")
        columns = header.split("\t")
        for line in lines:
            yield dict(zip(columns, line.split("\t"), strict=False))
    elif ending == ".csv":
        yield from csv.DictReader(io.StringIO(text, newline=""))
    elif ending == ".jsonl":
        yield from (json.loads(line) for line in text.split("\n") if line.strip())
    else:
        raise ValueError(f"--task {path}: the name must end in {', '.join(_ENDINGS)}, perhaps with .gz.")


def _classes(labels: list[str]) -> list[str]:
    distinct = set(labels)
    if all(label.lstrip("-").isdigit() for label in distinct):
        return sorted(distinct, key=int)
    if any("." in label for label in distinct) and all(_is_number(label) for label in distinct):
        return []
    return sorted(distinct)


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True
