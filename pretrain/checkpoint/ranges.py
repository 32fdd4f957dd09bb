"""Which bytes of which files does a rank need, and how do they reach its tensors in few requests?"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.store import Store

LARGEST = 2**25  # bytes of one request
LARGEST_GAP = 2**18  # bytes that nobody needs, read all the same since another request takes longer
READERS = 8  # requests at once
HEADER = "<Q"  # a safetensors file begins with the length of its header
LARGEST_HEADER = 2**25  # bytes; 10,000 tensors take 2 MB
ITEM = 4  # bytes of a float32
NOT_OURS = "it was written by another program, or is damaged; take another checkpoint"

# Where every parameter lies: {name: {"shape": [...], "parts": [[rank, start, numel], ...]}}
Layout = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Slice:
    """Which part of a flattened parameter a rank owns."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # first element owned
    numel: int  # elements owned, without padding; may be 0


@dataclass(frozen=True)
class Piece:
    """Float32 values that are wanted: where they lie in a file, and where they go."""

    first: int  # byte
    target: Tensor  # one-dimensional

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self.first + ITEM * self.target.numel()


class Files:
    """The tensor files of one checkpoint, whose headers are read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._extents: dict[str, dict[str, tuple[int, int]]] = {}  # first byte, and the one after the last
        self.layouts: dict[str, Layout] = {}

    def layout(self, whose: str) -> Layout:
        """Shapes and parts of the parameters of "student" or "teacher"; ValueError for what makes no whole ones."""
        if whose not in self.layouts:
            told = json.loads(self.store.read(f"{whose}/layout.json"))
            self.layouts[whose] = whole_layout(told, f"{self.store}/{whose}/layout.json")
        return self.layouts[whose]

    def require_bytes(self, whose: str) -> None:
        """ValueError for a layout of more values than its files hold, before memory is taken for them."""
        layout, sizes = self.layout(whose), self.store.sizes()
        wanted = sum(ITEM * math.prod(entry["shape"]) for entry in layout.values())
        files = {f"{whose}/{rank_name(part[0])}.safetensors" for e in layout.values() for part in e["parts"]}
        stored = sum(sizes.get(file, 0) for file in files)
        if wanted > stored:
            raise ValueError(
                f"{self.store}/{whose}/layout.json tells of {wanted:,} bytes of values, where its files have "
                f"{stored:,}: {NOT_OURS}"
            )

    def fill(self, whose: str, kind: str, wanted: Mapping[str, tuple[int, Tensor]], prefix: str = "") -> None:
        """Copies into one-dimensional float32 tensors what the files of `kind` hold of them.

        `wanted` is by name of the parameter: the element of it with which the tensor begins, and the tensor. In the
        files it has `prefix` before its name. Reads only what is needed. ValueError when something is not there.
        """
        by_file: dict[str, list[Piece]] = defaultdict(list)
        for name, (begin, target) in wanted.items():
            end, found = begin + target.numel(), 0
            for rank, start, numel in self.layout(whose)[name]["parts"]:
                first, last = max(begin, start), min(end, start + numel)
                if first >= last:
                    continue
                file = f"{kind}/{rank_name(rank)}.safetensors"
                offset = self._offset(file, f"{prefix}{name}", numel) + ITEM * (first - start)
                by_file[file].append(Piece(offset, target[first - begin : last - begin]))
                found += last - first
            if found != target.numel():
                raise ValueError(f"{self.store} holds {found} of {target.numel()} values of {name}")
        requests = [(file, group) for file, pieces in by_file.items() for group in _grouped(pieces)]
        mode = torch.is_inference_mode_enabled()  # of this thread: tensors made in it may change in it alone

        def read(request: tuple[str, list[Piece]]) -> None:
            with torch.inference_mode(mode), torch.no_grad():
                self._read(*request)

        with ThreadPoolExecutor(READERS) as readers:
            list(readers.map(read, requests))

    def _offset(self, file: str, name: str, numel: int) -> int:
        """The byte where so many values begin; ValueError unless the file says the same of them."""
        if file not in self._extents:
            (length,) = struct.unpack(HEADER, self.store.read(file, 0, 8))
            if not 0 < length <= LARGEST_HEADER:  # before memory is taken for it
                raise ValueError(
                    f"{self.store}/{file} begins with a header of {length} bytes, more than {LARGEST_HEADER}: "
                    f"{NOT_OURS}"
                )
            header = json.loads(self.store.read(file, 8, 8 + length))
            header.pop("__metadata__", None)
            self._extents[file] = {
                key: tuple(8 + length + place for place in one["data_offsets"]) for key, one in header.items()
            }
            ordered = sorted(self._extents[file].values())
            if any(end > begin for (_, end), (begin, _) in itertools.pairwise(ordered)):
                raise ValueError(f"{self.store}/{file} holds tensors that share bytes: {NOT_OURS}")
        begin, end = self._extents[file].get(name, (0, 0))
        if end - begin != ITEM * numel:
            raise ValueError(
                f"{self.store}/{file} holds {end - begin} bytes of {name}, where its layout tells of {numel} float32 "
                f"values: {NOT_OURS}"
            )
        return begin

    def _read(self, file: str, pieces: list[Piece]) -> None:
        begin = pieces[0].first
        content = self.store.read(file, begin, max(piece.end for piece in pieces))
        for piece in pieces:
            values = torch.frombuffer(
                content, dtype=torch.float32, count=piece.target.numel(), offset=piece.first - begin
            )
            piece.target.copy_(values)


def whole_layout(told: Any, place: str) -> Layout:
    """The parameters of a layout.json; ValueError unless parts of different ranks, end to end, make up each."""
    try:
        odd = [name for name, entry in told["parameters"].items() if not _is_whole(entry)]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place} is no list of parameters and their parts ({error!r}): {NOT_OURS}"
        ) from error
    if odd:
        raise ValueError(f"{place} does not tell where the whole of {odd[0]} lies: {NOT_OURS}")
    return told["parameters"]


def _is_whole(entry: Mapping[str, Any]) -> bool:
    end, parts, shape = 0, sorted(entry["parts"], key=lambda part: part[1]), entry["shape"]
    for _, start, numel in parts:
        if start != end or numel < 0:
            return False
        end += numel
    are_of_different_ranks = len({rank for rank, _, _ in parts}) == len(parts)
    return are_of_different_ranks and end == math.prod(shape) and min(shape, default=0) >= 0


def rank_name(index: int) -> str:
    """How the files of a rank are called."""
    return f"rank_{index:05d}"


def _grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces of one file that are read by one request each."""
    group: list[Piece] = []
    for piece in sorted(_small(pieces), key=lambda piece: piece.first):
        is_near = group and piece.first - group[-1].end <= LARGEST_GAP
        if group and not (is_near and piece.end - group[0].first <= LARGEST):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _small(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same values in pieces that a request may hold."""
    most = LARGEST // ITEM
    for piece in pieces:
        for start in range(0, piece.target.numel(), most):
            yield Piece(piece.first + ITEM * start, piece.target[start : start + most])
