"""What is kept of a log when a run goes on, and who writes on? OUT/log.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

LOG = "log.jsonl"


def records(path: Path, until: int) -> list[dict[str, Any]]:
    """Lines of a log up to a step, without those that a crash damaged."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [record for record in map(_record_of, lines) if record is not None and record["step"] <= until]


def _record_of(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def open_log(path: Path, kept: list[dict[str, Any]]) -> IO[str]:
    """The log for appending, with nothing but the records that are kept."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(partial, path)
    return path.open("a")
