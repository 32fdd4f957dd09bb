"""What does a command of several ranks say when they do not meet?"""

from __future__ import annotations

from datetime import timedelta

import pytest

from pretrain.exits import FAILED
from pretrain.ranks import exit_code_of_ranks


@pytest.mark.parametrize("port", ["abc", "1"])  # no number; nobody listens there
def test_ranks_that_do_not_meet_are_told_in_one_message(
    port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    code = exit_code_of_ranks(lambda _: pytest.fail("it began"), [], "nothing", timedelta(seconds=0.5))
    said = capsys.readouterr().err
    assert code == FAILED and said.startswith(
        "error: this rank does not meet the others by RANK=1, WORLD_SIZE=2"
    )
    assert f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port} (" in said and "start by torchrun" in said
