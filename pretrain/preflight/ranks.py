"""Which of the ranks is this process, and on which node?"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.host import host_name
from pretrain.preflight.told import Place

SCONTROL_SECONDS = 10.0
LOCAL_SIZES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")  # environment: ranks of a node, by one launcher or another


@dataclass(frozen=True)
class Ranks:
    """What the launcher's environment says; one rank alone without a launcher."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_size: int = 1  # ranks of this node
    node: int = 0
    nodes: int = 1
    host: str = "localhost"

    @property
    def place(self) -> Place:
        return Place(self.rank, self.node, self.host)

    @property
    def is_node_first(self) -> bool:
        """Does this rank speak for its node?"""
        return self.local_rank == 0

    def node_of(self, rank: int) -> int:
        return rank // self.local_size


def ranks_of(environment: Mapping[str, str] | None = None) -> Ranks:
    """From the variables of DeepSpeed's launcher, or torchrun's; ValueError for a number that is none."""
    environment = os.environ if environment is None else environment
    host = host_name()
    if "RANK" not in environment:
        return Ranks(host=host)
    world = _number(environment, ("WORLD_SIZE",), 1)
    local_size = _number(environment, LOCAL_SIZES, world)
    rank = _number(environment, ("RANK",), 0)
    return Ranks(
        rank=rank,
        world=world,
        local_rank=_number(environment, ("LOCAL_RANK",), rank % max(local_size, 1)),
        local_size=max(local_size, 1),
        node=_number(environment, ("CROSS_RANK", "GROUP_RANK", "NODE_RANK"), rank // max(local_size, 1)),
        nodes=_number(environment, ("CROSS_SIZE", "NODES"), -(-world // max(local_size, 1))),
        host=host,
    )


def _number(environment: Mapping[str, str], names: tuple[str, ...], default: int) -> int:
    for name in names:
        if name in environment:
            try:
                return int(environment[name])
            except ValueError:
                raise ValueError(
                    f"{name}={environment[name]!r} must be a whole number: the launcher sets it"
                ) from None
    return default


def planned_hosts(nodes: int) -> dict[int, str]:
    """Names by node number of nodes that may not have come, where the allocation tells them; else nothing."""
    listed = os.environ.get("SLURM_JOB_NODELIST", "")
    if not listed:
        return {}
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", listed],
            capture_output=True,
            text=True,
            check=True,
            timeout=SCONTROL_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    hosts = done.stdout.split()
    return dict(enumerate(hosts)) if len(hosts) == nodes else {}
