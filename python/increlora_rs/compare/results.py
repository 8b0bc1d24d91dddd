"""The file of results: one line of JSON a run, appended whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def run_id(config: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that tell runs apart by all that determines their result."""
    text = json.dumps(config, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_results(path: Path) -> list[Record]:
    """The runs in ``path``, the latest of each; a last line that a kill cut off is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is no JSON, or not what :meth:`Results.append` wrote.
    """
    if not path.exists():
        raise FileNotFoundError(f"--out {path} does not exist; there are no results yet.")
    return _parse(path, path.read_bytes())


class Results:
    """The file, open for one process to append to.

    Raises:
        ValueError: another process has it open, or a line is damaged.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            self.records = _parse(path, content)
            # What a kill left of a line would otherwise begin the next one.
            os.ftruncate(self._file, whole)
        except OSError as error:
            os.close(self._file)
            raise ValueError(f"--out {path}: another comparison is writing to it; give another.") from error
        except ValueError:
            os.close(self._file)
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def find(self, identity: str) -> Record | None:
        """The run of that id, if it is there."""
        return next((record for record in self.records if record["id"] == identity), None)

    def append(self, record: Record) -> None:
        """Writes a run, on the disk when this returns; it takes the place of one with its id."""
        line = json.dumps(record, allow_nan=False) + "\n"
        os.write(self._file, line.encode())
        os.fsync(self._file)
        self.records = _latest([*self.records, record])


def _parse(path: Path, content: bytes) -> list[Record]:
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"--out {path}: line {number} is no JSON ({error}); mend or remove it."
            ) from error
        if not _is_run(record):
            raise ValueError(
                f"--out {path}: line {number} is no run of this release's compare; give another file."
            )
        records.append(record)
    return _latest(records)


def _is_run(record: Any) -> bool:
    if not isinstance(record, dict) or not {"id", "status"} <= record.keys():
        return False
    config = record.get("config")
    return isinstance(config, dict) and {"method", "options", "task", "r", "lr", "seed"} <= config.keys()


def _latest(records: list[Record]) -> list[Record]:
    return list({record["id"]: record for record in records}.values())
