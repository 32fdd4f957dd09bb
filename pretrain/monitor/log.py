"""What is kept of a log when a run goes on, and who writes on? OUT/log.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain import strict_json
from pretrain.appended import Appended

LOG = "log.jsonl"


def records(path: Path, until: float) -> list[dict[str, Any]]:
    """Lines of a log up to a step, without those that a crash damaged."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [record for record in map(_record_of, lines) if record is not None and record["step"] <= until]


def _record_of(line: str) -> dict[str, Any] | None:
    try:
        record = strict_json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def line_of(record: dict[str, Any]) -> bytes:
    """A record as the log has it."""
    return (strict_json.dumps(record) + "\n").encode()


def open_log(path: Path, kept: list[dict[str, Any]], say: Callable[[str], object]) -> Appended:
    """The log for appending, with nothing but the records that are kept."""
    return Appended(path, say, whole=b"".join(map(line_of, kept)))
