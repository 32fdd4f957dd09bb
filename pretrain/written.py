"""How is frozen data written down, and read again without losing a word of it?"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Data = TypeVar("Data")
MOST_PROBLEMS = 5  # that one message tells


def to_json(data: Any) -> str:
    """A dataclass as text, from which `from_json` makes an equal one."""
    return json.dumps(dataclasses.asdict(data), indent=1)


def _problem(problem: Mapping[str, Any]) -> str:
    """`optim.lr="fast": Input should be a valid number`."""
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{field} is missing"
    if problem["type"] == "json_invalid":
        return problem["msg"]
    return f"{field}={reprlib.repr(problem['input'])}: {problem['msg']}".removeprefix("=")


def from_json(kind: type[Data], text: str) -> Data:
    """The dataclass that a text describes; a field that it leaves out has its default.

    ValueError names the fields whose value does not fit, and those that `kind` does not have: what they once said
    would be lost.
    """
    try:
        data = TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise ValueError(
            "; ".join(_problem(problem) for problem in error.errors()[:MOST_PROBLEMS])
        ) from error
    if unknown := _unknown(json.loads(text), dataclasses.asdict(data)):
        raise ValueError(
            f"{', '.join(unknown)}: no such field in a {kind.__name__} of this version; it was written by another "
            "version, or is misspelt: remove it or write its successor"
        )
    return data


def _unknown(written: dict[str, Any], known: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names, with their values, of what is written and not known."""
    found = []
    for name, value in written.items():
        if name not in known:
            found.append(f"{prefix}{name}={json.dumps(value)}")
        elif isinstance(value, dict) and isinstance(known[name], dict):
            found += _unknown(value, known[name], f"{prefix}{name}.")
    return found
