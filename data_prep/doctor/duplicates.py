"""Which samples of a data set show the same picture, byte for byte or nearly?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_prep.doctor.near import pairs_within
from data_prep.doctor.perceptual import is_textured

MOST_EXAMPLES = 40  # groups that are told by their members
MOST_MEMBERS = 6  # of such a group


@dataclass(frozen=True)
class Duplicates:
    """Groups of samples that show the same; a group keeps one and would lose the others."""

    num_groups: int
    num_samples: int  # in groups
    num_flat: int  # pictures without texture, which are left out
    examples: tuple[tuple[int, ...], ...]  # numbers of samples in the data set, of the largest groups first

    @property
    def num_extra(self) -> int:
        """Samples beyond the first of each group."""
        return self.num_samples - self.num_groups


def exact_duplicates(hashes: np.ndarray) -> Duplicates:
    """Samples of equal hashes (uint64 [n], the first bits of a SHA-256). Memory: 32 bytes a sample."""
    ordered = np.sort(hashes)
    starts = (
        np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else ordered
    )
    sizes = np.diff(np.append(starts, len(ordered)))
    doubled = sizes > 1
    largest = np.argsort(-sizes[doubled], kind="stable")[:MOST_EXAMPLES]
    values = ordered[starts[doubled]] if len(ordered) else ordered
    return Duplicates(
        num_groups=int(doubled.sum()),
        num_samples=int(sizes[doubled].sum()),
        num_flat=0,
        examples=tuple(_numbers(hashes, values[at : at + 1]) for at in largest),
    )


def near_duplicates(hashes: np.ndarray, distance: int) -> Duplicates:
    """Samples whose perceptual hashes (uint64 [n]) are within `distance` bits, or linked by a chain of such.

    Flat pictures are left out: their hashes are alike whatever their colour. Memory: 90 bytes a sample.
    """
    flat = ~is_textured(hashes)
    values, counts = np.unique(hashes[~flat], return_counts=True)
    left, right = pairs_within(values, distance)
    if not len(left) and not (counts > 1).any():
        return Duplicates(0, 0, int(flat.sum()), ())
    links = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(len(values), len(values)))
    num_groups, group = connected_components(links, directed=False)
    sizes = np.bincount(group, weights=counts, minlength=num_groups).astype(np.int64)
    doubled = np.flatnonzero(sizes > 1)
    largest = doubled[np.argsort(-sizes[doubled], kind="stable")[:MOST_EXAMPLES]]
    return Duplicates(
        num_groups=len(doubled),
        num_samples=int(sizes[doubled].sum()),
        num_flat=int(flat.sum()),
        examples=tuple(_numbers(hashes, values[group == number]) for number in largest),
    )


def _numbers(hashes: np.ndarray, wanted: np.ndarray) -> tuple[int, ...]:
    """The first few samples with one of the wanted hashes."""
    return tuple(np.flatnonzero(np.isin(hashes, wanted))[:MOST_MEMBERS].tolist())
