"""What became of every tensor of the towers in one exported file? None is dropped in silence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Keys:
    written: dict[str, str]  # name in our towers -> name in the file
    skipped: dict[str, str]  # name in our towers -> why it is not in the file
    added: dict[str, str] = field(
        default_factory=dict
    )  # name in the file -> why it is there without being ours

    def require_whole(self, ours: Iterable[str], theirs: Iterable[str]) -> Keys:
        """Itself when it tells of every tensor of the towers and of the file; else AssertionError."""
        ours, theirs = set(ours), set(theirs)
        told = self.written.keys() | self.skipped.keys()
        assert told == ours and not self.written.keys() & self.skipped.keys(), f"not told of: {told ^ ours}"
        assert {*self.written.values(), *self.added} == theirs, "the file holds other tensors than told"
        assert len(set(self.written.values())) == len(self.written), "two tensors have one name in the file"
        return self

    @property
    def renamed(self) -> dict[str, str]:
        return {ours: theirs for ours, theirs in self.written.items() if ours != theirs}

    def record(self) -> dict[str, Any]:
        return {
            "written": sorted(self.written.values()),
            "renamed": self.renamed,
            "added": self.added,
            "skipped": self.skipped,
        }

    def __str__(self) -> str:
        return (
            f"{len(self.written)} tensors written ({len(self.renamed)} renamed), {len(self.added)} added, "
            f"{len(self.skipped)} skipped"
        )
