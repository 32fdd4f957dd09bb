"""Does a rank that cannot meet the others say why, and is who did not come named?"""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from pretrain.exits import FAILED, MISTAKE
from pretrain.preflight import meeting
from pretrain.preflight.__main__ import main, read_run
from pretrain.preflight.board import Board
from pretrain.preflight.check import Here, gather
from pretrain.preflight.checks import CHECKS
from pretrain.preflight.options import Options, read_options
from pretrain.preflight.ranks import Ranks, ranks_of

SOON = Options(connect_seconds=0.2)
LAUNCHED = {
    "RANK": "9",
    "WORLD_SIZE": "24",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "8",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "3",
}


def test_ranks_are_those_of_the_launcher() -> None:
    ranks = ranks_of(LAUNCHED)
    assert (ranks.rank, ranks.world, ranks.local_size, ranks.node, ranks.nodes) == (9, 24, 8, 1, 3)
    assert not ranks.is_node_first
    assert ranks_of({}).world == 1
    with pytest.raises(ValueError, match="WORLD_SIZE='x' must be a whole number"):
        ranks_of(LAUNCHED | {"WORLD_SIZE": "x"})


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1", "that machine answers and nobody listens at the port"),
        ("no-such-node.invalid", "that name is unknown here: mend DNS"),
    ],
)
def test_a_node_that_reaches_nobody_says_so_with_its_name(
    address: str, reason: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", str(free_port))
    ranks = Ranks(rank=8, world=16, local_size=8, node=1, nodes=2, host="bee")
    with pytest.raises(
        meeting.NotMet, match=rf"node bee \(node 1, rank 8\) does not reach MASTER_ADDR.*{reason}"
    ):
        meeting.meet(ranks, SOON)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (TimeoutError(), "a firewall drops it"),
        (OSError(113, "No route to host"), "No route to host: set MASTER_ADDR"),
    ],
)
def test_what_cannot_be_tried_here_is_explained(error: OSError, remedy: str) -> None:
    assert remedy in meeting._why(error)


def test_rank_0_names_a_port_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(
            meeting.NotMet, match="the port is in use: two nodes may have NODE_RANK=0, else set another"
        ):
            meeting.meet(Ranks(world=2, nodes=2, host="ant"), SOON)


def test_rank_0_meets_where_the_agent_of_torchrun_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(agent.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    board, _ = meeting.meet(Ranks(), SOON)
    board.tell("here", 7)
    assert agent.get("preflight/here") == b"7"


def test_an_address_that_is_not_said_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(meeting.NotMet, match="does not know where rank 0 is"):
        meeting.meet(Ranks(world=2), SOON)


def test_nodes_that_did_not_come_are_named_as_far_as_names_are_known() -> None:
    ranks = Ranks(world=32, local_size=8, nodes=4, host="ant")
    message = meeting.missing_text(ranks, [*range(16), *range(17, 24)], {3: "dog"})
    assert message.startswith("23 of 32 ranks met at rank 0 on ant; missing: node ? (node 2, rank 16); ")
    assert "node dog (node 3, all its ranks, ranks 24 to 31)" in message


def test_options_come_from_the_environment_or_the_command_and_the_rest_is_training_s() -> None:
    arguments = ["--local_rank=1", "--recipe", "m3i.demo", "--report", "r.json", "--optim.lr", "1"]
    options, rest = read_options(
        arguments, list(CHECKS), {"PREFLIGHT_MIN_GB_S": "7", "PREFLIGHT_REPORT": "other"}
    )
    assert (options.report, options.min_gb_s) == ("r.json", 7.0)
    assert rest == ["--recipe", "m3i.demo", "--optim.lr", "1"]
    with pytest.raises(ValueError, match="PREFLIGHT_MAX_SKEW='much' must be a number, such as 1"):
        read_options([], list(CHECKS), {"PREFLIGHT_MAX_SKEW": "much"})
    with pytest.raises(ValueError, match=r"PREFLIGHT_CONNECT_SECONDS=0\.0 must be positive"):
        read_options(["--connect-seconds", "0"], list(CHECKS), {})


def test_everything_that_is_wrong_with_the_options_is_told_at_once() -> None:
    wrong = {"MAX_SKEW": "much", "MIN_SPEED": "-1", "CHECK_SECONDS": "0", "ONLY": "clok", "SKIP": "shmm"}
    with pytest.raises(ValueError) as caught:
        read_options([], list(CHECKS), {f"PREFLIGHT_{name}": text for name, text in wrong.items()})
    told = str(caught.value)
    assert [name for name in wrong if told.count(f"PREFLIGHT_{name}=") == 1] == list(wrong)


def test_checks_are_chosen_and_others_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert Options(only="clock, shm", skip="shm").chosen(list(CHECKS)) == ["clock"]
    assert main(["--skip", "clok"]) == MISTAKE
    assert "PREFLIGHT_SKIP=clok is unknown; choose from ['ranks', " in capsys.readouterr().err


def test_help_lists_every_check_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}: " in shown for name in CHECKS)
    assert "PREFLIGHT_CONNECT_SECONDS or --connect-seconds" in shown


def test_one_rank_checks_its_machine_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    code = main(["--only", "ranks,arguments,clock,shm,open_files"])
    shown = capsys.readouterr().out
    assert code in (0, FAILED), "this machine may lack something"
    assert "nothing to train: the machines alone" in shown
    assert "preflight of 1 rank on 1 node: " in shown.splitlines()[-1]


def test_a_mistake_in_the_command_is_a_failure_that_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert (
        main(["--only", "arguments", "--recipe", "m3i.dmo", "--data", "a=tests", "--out", "out"]) == MISTAKE
    )
    assert "FAILED arguments: node " in (shown := capsys.readouterr().out)
    assert "recipe='m3i.dmo' is unknown, did you mean 'm3i.demo'? choose from" in shown
    run, _, mistake = read_run(
        ["--recipe", "m3i.demo", "--data", "labelled=tests", "captioned=jobs", "--out", "o", "--x", "1"]
    )
    assert run is None
    assert mistake == "Unrecognized options: --x, 1", "also what tyro refuses, without its frame"
    _, _, mistake = read_run(["--recipe", "m3i.demo", "--out", "o"])
    assert mistake == "the following arguments are required: --data"


def _arrived(store: dist.Store, ranks: Ranks) -> Board:
    board = Board(store, ranks, 1.0)
    board.count(f"claims/{ranks.rank}")
    board.tell(f"arrived/{ranks.rank}", {"node": ranks.node, "host": ranks.host, "world": ranks.world})
    board.count("arrivals")
    return board


def test_two_nodes_of_one_number_are_both_named() -> None:
    store = dist.HashStore()
    first, second = (Ranks(rank=1, world=2, node=1, nodes=2, host=host) for host in ("bee", "cow"))
    _arrived(store, first)
    twins = r"node cow \(node 1, rank 1\) and node bee \(node 1, rank 1\) are the same rank: give every node its own"
    with pytest.raises(meeting.NotMet, match=twins):
        meeting._roll_call(store, second, SOON, 0.0)
    zero = Ranks(world=2, nodes=2, host="ant")
    told, is_lost = meeting._missing(_arrived(store, zero), zero, 0.0)
    assert "are the same rank" in told
    assert is_lost, "a machine that was started again may have come before the others ended"


def test_a_node_that_counts_other_ranks_is_named() -> None:
    store = dist.HashStore()
    zero = Ranks(world=2, nodes=2, host="ant")
    _arrived(store, Ranks(rank=1, world=3, node=1, nodes=3, host="bee"))
    told, is_lost = meeting._missing(_arrived(store, zero), zero, 0.0)
    assert not is_lost and told.startswith(
        "rank 0 on ant counts 2 ranks, node bee (node 1, rank 1) counts 3: give all nodes the same"
    )


def test_a_rank_that_falls_silent_is_named_with_what_it_did() -> None:
    store = dist.HashStore()
    zero = Ranks(world=2, nodes=2, host="ant")
    _arrived(store, Ranks(rank=1, world=2, node=1, nodes=2, host="bee")).begin("data (manifests)")
    board = _arrived(store, zero)
    board._seconds = 0.1
    told, silent = gather(Here(zero, board, SOON), {})
    assert [one.place.rank for one in told] == [0]
    [problem] = silent
    assert str(problem.place) == "node bee (node 1, rank 1)"
    assert problem.value == "died or hangs at: data (manifests)"


def test_another_run_s_port_is_not_waited_at_for_ever(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_run = dist.TCPStore("127.0.0.1", free_port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port))
    monkeypatch.setattr(meeting, "GRACE", 0.1)
    ranks = Ranks(rank=1, world=2, node=1, nodes=2, host="bee")
    with pytest.raises(meeting.NotMet, match=r"bee .* met somebody .* change MASTER_PORT on all nodes"):
        meeting.meet(ranks, SOON)
    assert other_run.port == free_port
