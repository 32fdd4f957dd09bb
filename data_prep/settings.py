"""In what do two settings differ? Field by field, with the old and the new value, for a person to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SHOWN = 60  # characters of a value
MOST = 5  # fields that are named


def difference(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Every field that differs, as "limits.min_side: 32 there, 64 asked"; "" when none does."""
    told = list(_differing(json.loads(json.dumps(there)), json.loads(json.dumps(asked)), ""))
    more = f"; {len(told) - MOST} more" if len(told) > MOST else ""
    return "; ".join(told[:MOST]) + more


def _differing(there: Any, asked: Any, name: str) -> list[str]:
    if isinstance(there, dict) and isinstance(asked, dict):
        return [
            one
            for key in sorted(there.keys() | asked.keys())
            for one in _differing(there.get(key), asked.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if there == asked else [f"{name}: {_shown(there)} there, {_shown(asked)} asked"]


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
