"""What does a line of a run's log tell of the devices? For the console and for readers of the log, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_of_gpus(record: Mapping[str, Any]) -> bool:
    """Has every rank a GPU? The hours of a rank on a CPU are those of no device."""
    return "allocated" in record.get("memory_bytes", {})
