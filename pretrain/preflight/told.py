"""What does a check find, where, and how is a node that differs from the others named?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WARNING, FAILED = "warning", "FAILED"


@dataclass(frozen=True, order=True)
class Place:
    """A rank, and the node that it runs on. Host names alone may be equal."""

    rank: int = 0
    node: int = 0
    host: str = "?"

    def __str__(self) -> str:
        return f"node {self.host} (node {self.node}, rank {self.rank})"


@dataclass(frozen=True)
class Told:
    """What a rank found: JSON data."""

    place: Place
    value: Any


@dataclass(frozen=True)
class Problem:
    """Something that is not as the rule wants it; `place` is None where it is nowhere in particular."""

    place: Place | None
    value: str
    remedy: str  # "" where the value says it, as errors of this project do
    rule: str = ""  # that of the check if empty
    status: str = FAILED


@dataclass(frozen=True)
class Judged:
    """What a check says of all ranks together."""

    value: str
    rule: str
    problems: Sequence[Problem] = ()


def differing(told: Sequence[Told], value: Callable[[Any], Any]) -> tuple[Any, list[Told]]:
    """What most ranks say, and the ranks that say something else; of equally many the first rank is right."""
    if not told:
        return None, []
    texts = [json.dumps(value(one.value), sort_keys=True, default=str) for one in told]
    counts = Counter(texts)
    most = max(counts, key=lambda text: (counts[text], text == texts[0], -texts.index(text)))
    return json.loads(most), [one for one, text in zip(told, texts, strict=True) if text != most]


def differences(
    told: Sequence[Told], what: str, remedy: str, status: str = FAILED, keys: Sequence[str] | None = None
) -> list[Problem]:
    """A problem for each rank and key whose value differs from that of the majority; values are flat mappings."""
    problems = []
    names = sorted({key for one in told for key in one.value}) if keys is None else keys
    for key in names:
        usual, others = differing(told, lambda value, key=key: value.get(key))
        num = len(told) - len(others)
        problems += [
            Problem(
                one.place,
                f"{what}{key}={shown(one.value.get(key))}, {num} of {len(told)} have {shown(usual)}",
                remedy,
                status=status,
            )
            for one in others
        ]
    return problems


def shown(value: Any) -> str:
    """A value in few words; digests are cut."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= 200 else text[:197] + "..."


def size(num_bytes: float) -> str:
    """`8.0 GiB`, or `43 MiB`."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def span(values: Mapping[Place, float], unit: str, form: str = ".3g") -> str:
    """`12 to 13 GB/s`, or one number where they are the same."""
    if not values:
        return "nothing measured"
    low, high = format(min(values.values()), form), format(max(values.values()), form)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"
