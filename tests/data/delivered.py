"""What does a loader deliver, and are two batches the same?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pretrain.config import Run
from pretrain.data.batch import Batch
from pretrain.data.loader import Loader
from pretrain.place import Place


def batches(
    run: Run,
    places: Mapping[str, Place],
    num: int,
    rank: int = 0,
    world: int = 1,
    tokenizer: Path | None = None,
    **options: Any,
) -> list[Batch]:
    loader = Loader(run, places, tokenizer, rank=rank, world=world, **options)
    delivered = list(islice(loader, num))
    loader.close()
    return delivered


def joined(parts: Sequence[Batch]) -> Batch:
    fields = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields})


def assert_same(first: Batch, second: Batch) -> None:
    for field in dataclasses.fields(Batch):
        one, other = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(one, other), field.name
