"""Do all ranks reach rank 0, and which did not come?

The most frequent failure of a cluster, so it is told before a process group exists: whoever cannot connect says so
with its node's name, and rank 0, which hosts torch's TCPStore where the training will, names who is missing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from pretrain.preflight.board import Board, Silent
from pretrain.preflight.options import Options, as_record, option, variable
from pretrain.preflight.ranks import Ranks, planned_hosts
from pretrain.preflight.told import Place

ATTEMPT = 5.0  # seconds of one attempt to connect
PAUSE = 0.5  # seconds between two
GRACE = 30.0  # seconds more that the others wait for what rank 0 makes of the roll call
MOST_NAMED = 20  # nodes in one message


class NotMet(ConnectionError):
    """The ranks are not all there. `is_heard`: rank 0 has told it; `is_lost`: another start may go well."""

    def __init__(self, message: str, is_heard: bool = False, is_lost: bool = False) -> None:
        super().__init__(message)
        self.is_heard, self.is_lost = is_heard, is_lost


def meet(ranks: Ranks, options: Options) -> tuple[Board, Options]:
    """Where the ranks tell each other what they find, and rank 0's options; NotMet unless all are there."""
    address = _address(ranks)
    begun = time.monotonic()
    if ranks.rank > 0:
        _connect(ranks, address, options.connect_seconds)
    try:
        rest = max(options.connect_seconds - (time.monotonic() - begun), ATTEMPT)
        store = _store(address, ranks.rank == 0 and not _is_hosted(), rest)
    except RuntimeError as error:  # torch's DistError, of every kind
        raise NotMet(_no_store(ranks, address, error)) from error
    try:
        return _roll_call(store, ranks, options, begun)
    except Silent as error:
        raise NotMet(
            f"{ranks.place} met somebody at {told(address)} who does not call the roll ({error}): another run "
            "may have that port, or an earlier start of this one: if it stays so, change MASTER_PORT on all nodes",
            is_lost=True,
        ) from error
    except dist.DistError as error:
        raise NotMet(
            f"{ranks.place} lost rank 0 at {told(address)} ({_first_line(error)}): see what ended there",
            is_lost=True,
        ) from error


def told(address: tuple[str, int]) -> str:
    return f"MASTER_ADDR:MASTER_PORT={address[0]}:{address[1]}"


def _address(ranks: Ranks) -> tuple[str, int]:
    """Where rank 0 listens, or a free port of this machine for one rank alone; NotMet when it is not said."""
    if ranks.world == 1 and "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return "127.0.0.1", free.getsockname()[1]
    try:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise NotMet(
            f"{ranks.place} does not know where rank 0 is ({error}): start by jobs/local/pretrain.sh or the "
            "deepspeed launcher, with MASTER_ADDR and a numeric MASTER_PORT"
        ) from None


def _is_hosted() -> bool:
    """Does torchrun's agent listen at MASTER_PORT, where its ranks meet?"""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(address: tuple[str, int], is_host: bool, seconds: float) -> dist.TCPStore:
    host, port = address
    limit = timedelta(seconds=seconds)
    return dist.TCPStore(host, port, is_master=is_host, timeout=limit, wait_for_workers=False)


def _connect(ranks: Ranks, address: tuple[str, int], seconds: float) -> None:
    """Returns once somebody listens at the address; NotMet with the reason of the last attempt after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        try:
            left = max(until - time.monotonic(), 0.1)
            socket.create_connection(address, timeout=min(ATTEMPT, left)).close()
            return
        except OSError as error:
            if time.monotonic() + PAUSE > until:
                raise NotMet(
                    f"{ranks.place} does not reach {told(address)} within {seconds:g} s: {_why(error)}",
                    is_lost=True,
                ) from error
        time.sleep(PAUSE)


def _why(error: OSError) -> str:
    """The reason of a refused connection, and the remedy."""
    if isinstance(error, socket.gaierror):
        return "that name is unknown here: mend DNS or /etc/hosts, or set MASTER_ADDR to an IP address"
    if isinstance(error, ConnectionRefusedError):
        return (
            "that machine answers and nobody listens at the port: look whether node 0 has started with this very "
            "MASTER_PORT, and whether MASTER_ADDR is node 0"
        )
    if isinstance(error, TimeoutError):
        return (
            "no answer: a firewall drops it, or the address belongs to a network that this node has no way into: "
            "open all ports between the nodes, or set MASTER_ADDR to another address of node 0"
        )
    return f"{error.strerror or error}: set MASTER_ADDR to an address of node 0 that this node has a route to"


def _no_store(ranks: Ranks, address: tuple[str, int], error: Exception) -> str:
    if ranks.rank > 0:
        return (
            f"{ranks.place} connects to {told(address)}, but what listens there is not rank 0 of this run "
            f"({_first_line(error)}): another program has the port: set another MASTER_PORT on all nodes"
        )
    if "in use" in str(error):
        return (
            f"{ranks.place} cannot listen at {told(address)}: the port is in use: two nodes may have NODE_RANK=0, "
            "else set another MASTER_PORT on all nodes"
        )
    return (
        f"{ranks.place} hosts the rendezvous and does not reach itself at {told(address)} ({_first_line(error)}): "
        "set MASTER_ADDR to an address of this node, and start node 0 here"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _roll_call(store: dist.Store, ranks: Ranks, options: Options, begun: float) -> tuple[Board, Options]:
    """Every rank writes its name; rank 0 says whether all came, with the options that count."""
    board = Board(store, ranks, options.check_seconds)
    mine = {"node": ranks.node, "host": ranks.host, "world": ranks.world}
    if board.count(f"claims/{ranks.rank}") > 1:
        twin = Place(
            ranks.rank, **{key: board.hear(f"arrived/{ranks.rank}")[key] for key in ("node", "host")}
        )
        message = f"{ranks.place} and {twin} are the same rank: give every node its own NODE_RANK, and start it once"
        board.tell("twice", message)
        raise NotMet(message, is_lost=True)  # or one that was started again comes before the others end
    board.tell(f"arrived/{ranks.rank}", mine)
    board.count("arrivals")
    if ranks.rank == 0:
        problem, is_lost = _missing(board, ranks, options.connect_seconds - (time.monotonic() - begun))
        board.tell("roll", {"problem": problem, "is_lost": is_lost, "options": as_record(options)})
        if problem:
            board.part(board.number("arrivals"))
            raise NotMet(problem, is_lost=is_lost)
        return board, options
    heard = board.hear("roll", options.connect_seconds + GRACE)
    if heard["problem"]:
        board.part(board.number("arrivals"))
        raise NotMet(heard["problem"], is_heard=True, is_lost=heard["is_lost"])
    return board, Options(**heard["options"])


def _missing(board: Board, ranks: Ranks, seconds: float) -> tuple[str, bool]:
    """What the roll call lacks after so many seconds, "" as soon as all are there; and whether ranks are lost."""
    until = time.monotonic() + seconds
    while not board.has("twice"):
        is_late = time.monotonic() > until
        if is_late or board.number("arrivals") >= ranks.world:
            there = {rank for rank in range(ranks.world) if board.has(f"arrived/{rank}")}
            if len(there) == ranks.world:
                return _other_worlds(board, ranks), False
            if is_late:
                return missing_text(ranks, there, planned_hosts(ranks.nodes)), True
        time.sleep(PAUSE / 5)
    return board.hear("twice"), True


def missing_text(ranks: Ranks, there: Iterable[int], hosts: dict[int, str]) -> str:
    """Which nodes did not come, with their names where the allocation told them."""
    there = set(there)
    missing: dict[int, list[int]] = {}
    for rank in range(ranks.world):
        if rank not in there:
            missing.setdefault(ranks.node_of(rank), []).append(rank)
    lines = [
        f"{f'node {hosts[node]} (node {node}' if node in hosts else f'node ? (node {node}'}, "
        f"{'all its ranks, ' if len(absent) == ranks.local_size else ''}{_runs(absent)})"
        for node, absent in list(missing.items())[:MOST_NAMED]
    ]
    more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
    option_text = f"{variable('connect_seconds')} or {option('connect_seconds')}"
    return (
        f"{len(there)} of {ranks.world} ranks met at rank 0 on {ranks.host}; missing: {'; '.join(lines)}{more}: look "
        f"at the output of those nodes for why, start them, or wait longer ({option_text})"
    )


def _runs(numbers: list[int]) -> str:
    """`rank 8`, or `ranks 8 to 15`."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return f"rank {first}"
    is_row = last - first + 1 == len(numbers)
    return f"ranks {first} to {last}" if is_row else f"ranks {', '.join(map(str, numbers))}"


def _other_worlds(board: Board, ranks: Ranks) -> str:
    """The nodes that count another number of ranks, which would wait for each other for ever; "" without."""
    heard = {rank: board.hear(f"arrived/{rank}") for rank in range(ranks.world)}
    others = [
        f"{Place(rank, one['node'], one['host'])} counts {one['world']}"
        for rank, one in heard.items()
        if one["world"] != ranks.world
    ]
    if not others:
        return ""
    return (
        f"rank 0 on {ranks.host} counts {ranks.world} ranks, {'; '.join(others[:MOST_NAMED])}: give all nodes the "
        "same NODES and RANKS, or hostfile"
    )
