"""Do all ranks hear what the first one found, also when it failed?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain.collectives import from_first_rank, rank
from tests.engine.launch import together


def _found() -> str:
    assert rank() == 0, "the others only listen"
    return "whole"


def _failed() -> None:
    raise ValueError("the folder is taken")


def _on_rank(index: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=index, world_size=world)
    heard = from_first_rank(_found)
    try:
        from_first_rank(_failed)
    except ValueError as error:
        Path(folder, str(index)).write_text(f"{heard}, {error}")
    dist.destroy_process_group()


def test_result_and_error_of_the_first_rank_reach_all(tmp_path: Path, free_port: int) -> None:
    together(_on_rank, 2, free_port, str(tmp_path), world=2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "0": "whole, the folder is taken",
        "1": "whole, the folder is taken",
    }


def test_alone_the_error_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="the folder is taken"):
        from_first_rank(_failed)
