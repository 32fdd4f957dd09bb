"""Does every node reach every other, with the right sums and fast enough, and which one does not?

Three steps, each of which names what the next one would only hang on: plain TCP connections between nodes, the
process group's all-reduce, and its transfers from each node to the next.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from pretrain.preflight.check import Here
from pretrain.preflight.told import FAILED, WARNING, Judged, Place, Problem, Told, span

HOPS = (1, 2, 4)  # nodes onward that each node connects to
CONNECT = 10.0  # seconds that a connection may take
BYTES = {
    "cuda": 256 * 2**20,
    "cpu": 4 * 2**20,
}  # of the tensor that is reduced, and of half of it that is sent
ROUNDS = 4  # the first warms up, of the others the best counts
PATTERN = 16  # ranks after which the numbers repeat, so that their sum is exact in float32
# GB/s of bus bandwidth: below the first the all-reduce fails, below the second it is warned of. Between GPUs of nodes
# 1 GB/s is what TCP over 10 Gb/s gives where InfiniBand was meant, 10 less than one card of 100 Gb/s; between GPUs of
# a node 4 is less than PCIe 3 x 8, 20 less than PCIe 4 x 16. Between CPUs 0.01 is 100 Mb/s, 0.1 is 1 Gb/s.
LIMITS = {"GPUs of nodes": (0.5, 10.0), "GPUs of a node": (4.0, 20.0), "CPUs": (0.01, 0.1)}


def look_at_reach(here: Here) -> dict[str, Any] | None:
    """Nodes that do not answer when this one connects to them by TCP, and why; and the slowest answer in seconds."""
    ranks = here.ranks
    if ranks.nodes == 1:
        return None
    family, address = own_address()
    with socket.create_server(("", 0), family=family, backlog=128) as server:
        threading.Thread(target=_answer, args=(server,), daemon=True).start()
        mine = [address, server.getsockname()[1]]
        here.board.tell(f"listens/{ranks.node}", mine)
        slowest, lost = 0.0, {}
        for hop in sorted({hop % ranks.nodes for hop in HOPS} - {0}):
            other = (ranks.node + hop) % ranks.nodes
            address = here.board.hear(f"listens/{other}")
            if other == 0 and is_loopback(address[0]) and not is_loopback(mine[0]):
                address[0] = os.environ[
                    "MASTER_ADDR"
                ]  # its own /etc/hosts gives that name an address of loopback
            try:
                slowest = max(slowest, _asked(address))
            except OSError as error:
                lost[str(other)] = f"{address[0]}: {error.strerror or error}"
        here.board.meet("reach", ranks.nodes)  # until all have asked
    return {"lost": lost, "seconds": slowest, "address": mine[0]}


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def own_address() -> tuple[socket.AddressFamily, str]:
    """This node's address on the way to MASTER_ADDR, of IPv4 or IPv6; nothing is sent."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return family, probe.getsockname()[0]


def _answer(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # closed: all have asked
            return
        with connection:
            connection.sendall(b"!")


def _asked(address: list[Any]) -> float:
    begun = time.monotonic()
    with socket.create_connection(tuple(address), timeout=CONNECT) as connection:
        if connection.recv(1) != b"!":
            raise OSError("it connects and does not answer")
    return time.monotonic() - begun


def judge_reach(told: Sequence[Told], here: Here) -> Judged:
    places = {one.place.node: one.place for one in told}
    lost = [(one.place, int(node), why) for one in told for node, why in one.value["lost"].items()]
    blamed = Counter(node for _, node, _ in lost)
    blamed.update(place.node for place, _, _ in lost)
    problems = []
    for place, node, why in lost:
        other = places.get(node, Place(-1, node))
        culprit, by = (other, place) if blamed[node] >= blamed[place.node] else (place, other)
        told_way = f"is not reached from {by}" if culprit == other else f"does not reach {by}"
        problems.append(
            Problem(
                culprit,
                f"{told_way} ({why})",
                "open all TCP ports between the nodes; see its firewall, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
            )
        )
    slowest = {one.place: one.value["seconds"] * 1e3 for one in told}
    return Judged(f"{len(told)} nodes, {span(slowest, 'ms')}", f"each answers within {CONNECT:g} s", problems)


def look_at_all_reduce(here: Here) -> dict[str, Any] | None:
    """GB/s over the bus and how many numbers of the sum are wrong; makes the process group. None alone."""
    ranks = here.ranks
    if ranks.world == 1:
        return None
    group = _process_group(here)
    numbers = torch.arange(BYTES[here.device.type] // 4, device=here.device) % 7
    total = sum(rank % PATTERN + 1 for rank in range(ranks.world))
    seconds, wrong = float("inf"), 0
    for _ in range(ROUNDS):
        tensor = numbers.float() * (ranks.rank % PATTERN + 1)
        taken = _timed(here, lambda tensor=tensor: dist.all_reduce(tensor, group=group))
        seconds = taken if seconds == float("inf") else min(seconds, taken)
        wrong = max(wrong, int((tensor != numbers * total).sum()))
    moved = 2 * (ranks.world - 1) / ranks.world * BYTES[here.device.type]
    return {"gb_s": moved / seconds / 1e9, "wrong": wrong, "backend": "nccl" if here.is_gpu else "gloo"}


def _process_group(here: Here) -> Any:
    """As training's: NCCL between GPUs, gloo otherwise, met through a store of its own; the same at every call."""
    if here.is_mixed:
        raise ValueError(
            f"{here.num_gpus} of {here.ranks.world} ranks have a GPU, all or none must: see gpu and versions"
        )
    if dist.is_initialized():
        return dist.group.WORLD
    limit = timedelta(seconds=here.options.check_seconds)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=limit)
    dist.init_process_group(
        "nccl" if here.is_gpu else "gloo",
        store=dist.PrefixStore("preflight/group", store),
        rank=here.ranks.rank,
        world_size=here.ranks.world,
        timeout=limit,
    )
    return dist.group.WORLD


def _timed(here: Here, work: Callable[[], Any]) -> float:
    """Seconds of a collective call, on this rank, until the device has its result."""
    if here.is_gpu:
        torch.cuda.synchronize(here.device)
    begun = time.perf_counter()
    work()
    if here.is_gpu:
        torch.cuda.synchronize(here.device)
    return time.perf_counter() - begun


def limits_of(here: Here) -> tuple[float, float]:
    """GB/s below which the all-reduce fails, and is warned of."""
    asked = here.options.min_gb_s
    kind = "CPUs" if not here.is_gpu else "GPUs of nodes" if here.ranks.nodes > 1 else "GPUs of a node"
    return (asked, asked) if asked else LIMITS[kind]


def judge_all_reduce(told: Sequence[Told], here: Here) -> Judged:
    least, wanted = limits_of(here)
    speeds = {one.place: one.value["gb_s"] for one in told}
    problems = [
        Problem(
            one.place,
            f"{one.value['wrong']} numbers of the sum are wrong",
            "drain the node: its memory or card",
        )
        for one in told
        if one.value["wrong"]
    ]
    if (speed := median(speeds.values())) < wanted:  # all of a sum wait for the slowest: no rank is to blame
        problems.append(
            Problem(
                None,
                f"bus bandwidth {speed:.3g} GB/s",
                "see which card NCCL or gloo took (NCCL_DEBUG=INFO), GPUDirect, and the links below for a slow node; "
                "PREFLIGHT_MIN_GB_S sets another limit",
                status=FAILED if speed < least else WARNING,
            )
        )
    rule = f"right, at least {least:g} GB/s, and {wanted:g} without a warning"
    return Judged(f"{span(speeds, 'GB/s')}, {told[0].value['backend']}", rule, problems)


def look_at_links(here: Here) -> dict[str, Any] | None:
    """GB/s at which this rank receives from its like on the node before, while all do. None on one node."""
    ranks = here.ranks
    if ranks.nodes == 1:
        return None
    group = _process_group(here)
    sent = torch.full((BYTES[here.device.type] // 8,), float(ranks.rank), device=here.device)
    received = torch.empty_like(sent)
    onward = (ranks.rank + ranks.local_size) % ranks.world
    before = (ranks.rank - ranks.local_size) % ranks.world
    seconds = float("inf")
    for _ in range(ROUNDS):
        received.zero_()
        taken = _timed(here, lambda: _pass_on(sent, onward, received, before, group))
        seconds = taken if seconds == float("inf") else min(seconds, taken)
    wrong = int((received != before).sum())
    return {"gb_s": sent.numel() * 4 / seconds / 1e9, "wrong": wrong, "from": before}


def _pass_on(sent: torch.Tensor, onward: int, received: torch.Tensor, before: int, group: Any) -> None:
    """Sends to one rank what is received from another, at once; waits for what comes in."""
    operations = [
        dist.P2POp(dist.isend, sent, onward, group),
        dist.P2POp(dist.irecv, received, before, group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def judge_links(told: Sequence[Told], here: Here) -> Judged:
    """A node whose links in both directions are slow is slow; of one slow link both ends are told."""
    places = {one.place.rank: one.place for one in told}
    speeds = {one.place: one.value["gb_s"] for one in told}
    middle, share = median(speeds.values()), here.options.min_link
    slow = [one for one in told if one.value["gb_s"] < share * middle]
    ends = Counter(node for one in slow for node in {one.place.node, here.ranks.node_of(one.value["from"])})
    remedy = "see its network card, cable and switch port (ibstat, ethtool), and what else uses them"
    problems = []
    for one in slow:
        sender = places.get(
            one.value["from"], Place(one.value["from"], here.ranks.node_of(one.value["from"]))
        )
        value = f"{one.value['gb_s']:.3g} GB/s from {sender}, the median is {middle:.3g}"
        is_sender = ends[sender.node] > ends[one.place.node]
        culprit = sender if is_sender else one.place
        if is_sender:
            value = f"{one.value['gb_s']:.3g} GB/s to {one.place}, the median is {middle:.3g}"
        problems.append(Problem(culprit, value, remedy, status=WARNING))
    problems += [
        Problem(one.place, f"{one.value['wrong']} numbers came wrong from rank {one.value['from']}", remedy)
        for one in told
        if one.value["wrong"]
    ]
    return Judged(span(speeds, "GB/s"), f"at least {share:g} of the median link's", problems)
