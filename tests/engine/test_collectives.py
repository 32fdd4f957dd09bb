"""Do all ranks hear what the first one found, also when it failed?"""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist

from data_prep.claim import ClaimLost
from pretrain.collectives import from_first_rank, on_every_rank, rank, sendable
from pretrain.data.faults import BadSample, DataAway, DataError, NobodyThere
from pretrain.evaluate.features import NoneReadable
from pretrain.lock import Busy
from pretrain.preflight.meeting import NotMet
from pretrain.retries import GaveUp
from tests.engine.launch import together


def _found() -> str:
    assert rank() == 0, "the others only listen"
    return "whole"


def _failed() -> None:
    raise ValueError("the folder is taken")


def _gave_up() -> None:
    raise GaveUp("the store has failed")


class OfALibrary(OSError):
    """As some are: its constructor does not take what pickle keeps."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{code}: {detail}")


def _failed_in_a_library() -> None:
    raise OfALibrary(503, detail="slow down")


def _away() -> str:
    if rank() == 1:
        raise DataAway("the store of rank 1 is away")
    return "opened"


def _gave_up_on_rank_1() -> None:
    if rank() == 1:
        _gave_up()


def _on_rank(index: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=index, world_size=world)
    heard = from_first_rank(_found)
    told = []
    for fails in (_failed, _gave_up, _failed_in_a_library):
        try:
            from_first_rank(fails)
        except (OSError, ValueError) as error:
            told.append(f"{type(error).__name__} {error}")
    for work in (_away, _gave_up_on_rank_1):
        try:
            on_every_rank(work)
        except (OSError, ValueError) as error:
            told.append(f"{type(error).__name__} {error}")
    Path(folder, str(index)).write_text("; ".join([heard, *told]))
    dist.destroy_process_group()


OF_RANK_1 = "DataAway the store of rank 1 is away; GaveUp [Errno 5] the store has failed"
TOLD = "whole; ValueError the folder is taken; GaveUp [Errno 5] the store has failed; "


def test_result_and_error_of_a_rank_reach_all(tmp_path: Path, free_port: int) -> None:
    together(_on_rank, 2, free_port, str(tmp_path), world=2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "0": f"{TOLD}OfALibrary 503: slow down; {OF_RANK_1}",
        "1": f"{TOLD}OSError 503: slow down; {OF_RANK_1}",
    }


def test_alone_the_error_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="the folder is taken"):
        from_first_rank(_failed)


@pytest.mark.parametrize(
    "error",
    [
        GaveUp("the store has failed"),
        BadSample("no_image", "the sample has none"),
        NoneReadable("no picture can be seen", Counter({"truncated": 3})),
        DataError("too many"),
        NobodyThere("refused"),
        ClaimLost("was taken over"),
        Busy("another writes"),
        NotMet("one is missing"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_ours_reach_other_processes_as_they_are(error: OSError | ValueError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error) and str(arrived) == str(error)
    assert vars(arrived) == vars(error)
    assert sendable(error) is error
