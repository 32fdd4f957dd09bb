"""Has a file more blocks than the model that its settings describe? Loaders of other packages pass them over."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

NUMBER = re.compile(r"\.(\d+)\.")


def require_no_more_blocks(place: Path, own: Iterable[str], unexpected: Iterable[str]) -> None:
    """ValueError where one of the `unexpected` tensors of a file would be of a further block of the model's `own`.

    What else a file holds, such as heads and another tower, is no reason.
    """
    stacks: dict[str, set[str]] = defaultdict(set)
    for name in own:
        for found in NUMBER.finditer(name):
            stacks[name[: found.start()]].add(found[1])
    more = [
        name
        for name in sorted(unexpected)
        for found in NUMBER.finditer(name)
        for stack, numbers in stacks.items()
        if f".{name[: found.start()]}".endswith(f".{stack}") and found[1] not in numbers
    ]
    if more:
        raise ValueError(
            f"{place} holds {len(set(more))} tensors of blocks that its settings do not tell of, such as {more[0]}: "
            "the model would be computed in part; take both from its authors again, or save the whole model again"
        )
