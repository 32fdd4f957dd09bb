"""What does a test tell a check of ranks that are not there?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain import recipes
from pretrain.preflight.board import Board
from pretrain.preflight.check import Here
from pretrain.preflight.options import Options
from pretrain.preflight.ranks import Ranks
from pretrain.preflight.told import Place, Told

HOSTS = ("ant", "bee", "bee")  # two nodes of one name, told apart by their number


def place(node: int) -> Place:
    return Place(rank=node, node=node, host=HOSTS[node])


def told(*values: Any) -> list[Told]:
    """What one rank of each node says."""
    return [Told(place(node), value) for node, value in enumerate(values)]


def three_nodes(folder: Path | None = None, options: Options | None = None, **paths: Any) -> Here:
    """Rank 0 of three nodes of a rank each; with `folder` it trains the demo's recipe."""
    ranks = Ranks(world=3, nodes=3, host=HOSTS[0])
    here = Here(ranks, Board(dist.HashStore(), ranks, 1.0), options or Options())
    if folder is not None:
        here.run = recipes.load("rows.classification_demo")
        given = {"out": folder / "out", "checkpoints": None, "workers": 0, "data": {}, "tokenizer": None}
        here.paths = argparse.Namespace(**given | paths)
    return here


def alone(here: Here) -> Here:
    """The same as the only rank."""
    here.ranks = Ranks()
    here.board = Board(dist.HashStore(), here.ranks, 1.0)
    return here


def statuses(rows: Sequence[Any]) -> dict[str, str]:
    return {row.name: row.status for row in rows}
