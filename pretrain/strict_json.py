"""How is a number written that JSON does not know? As "NaN", "Infinity", "-Infinity", strings, as by protobuf."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic import ConfigDict, TypeAdapter

_ANY = TypeAdapter(Any, config=ConfigDict(ser_json_inf_nan="strings"))
NUMBERS = ("NaN", "Infinity", "-Infinity")


def dumps(value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """As json.dumps, and JSON for every reader."""
    return _ANY.dump_json(value, indent=indent, fallback=default).decode()


def loads(text: str) -> Any:
    """What `dumps` wrote, or json.dumps with its bare NaN and Infinity; ValueError as json.loads."""
    return _with_numbers(json.loads(text))


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_numbers(one) for one in value]
    return float(value) if isinstance(value, str) and value in NUMBERS else value
