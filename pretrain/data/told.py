"""Which of the samples that a rank replaces does the console tell, and when?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from pretrain.appended import say
from pretrain.data.faults import OF_SHARDS, Dropped

MOST_PLACES = 3  # told in a line
MOST_LETTERS = 300  # of what is told of one


class Teller:
    """Tells what one rank replaces, in at most a line a step: each shard that is lost when it is first met, of other
    samples the first of a source and reason, and then one whenever their number has doubled; all since the start."""

    def __init__(self, rank: int, say: Callable[[str], object] = say) -> None:
        self._rank, self._say = rank, say
        self._lost: set[tuple[str, str, str]] = set()  # source, shard and reason
        self._counts: Counter[str] = Counter()  # by `Dropped.kind`, of samples whose shard is there

    def tell(self, step: int, dropped: Sequence[Dropped]) -> None:
        """Of the samples replaced in the batch `step`, as in the list of the rank, those whose turn it is."""
        told = [line for line in map(self._line, dropped) if line]
        if told:
            more = f"; and {len(told) - MOST_PLACES} more" if len(told) > MOST_PLACES else ""
            self._say(f"REPLACED on rank {self._rank}, batch {step}: {'; '.join(told[:MOST_PLACES])}{more}")

    def _line(self, sample: Dropped) -> str:
        """Empty where it is not to be told."""
        if sample.reason in OF_SHARDS:
            place = (sample.source, sample.shard, sample.reason)
            if place in self._lost:
                return ""
            self._lost.add(place)
            return _short(f"LOST {sample.source}/{sample.shard}: {sample.reason}: {sample.message}")
        self._counts[sample.kind] += 1
        count = self._counts[sample.kind]
        return "" if count & (count - 1) else f"{_short(str(sample))} ({count} such since the start)"


def _short(text: str) -> str:
    line = " ".join(text[: 2 * MOST_LETTERS].split())
    return line if len(line) <= MOST_LETTERS else line[:MOST_LETTERS] + "…"
