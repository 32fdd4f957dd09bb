"""Which checks are there, in which order? THE table: a new check is a function that looks, one that judges, a line.

What computes comes first, since a network that hangs may keep a GPU busy; what waits for disks and stores last.
"""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.preflight import clocks, gpus, machine, network, recipe, same, storage
from pretrain.preflight.check import Check, Here

CHECKS: dict[str, Check] = {
    "ranks": Check("as many ranks on every node", same.look_at_ranks, same.judge_ranks, "rank"),
    "arguments": Check(
        "the same command, recipe and ds config", same.look_at_arguments, same.judge_arguments, "rank"
    ),
    "versions": Check(
        "Python, torch, CUDA, NCCL, driver, packages, commit and code",
        same.look_at_versions,
        same.judge_versions,
    ),
    "environment": Check(
        "NCCL_*, GLOO_* and their like", same.look_at_environment, same.judge_environment, "rank"
    ),
    "gpu": Check("one a rank, free, without faults", gpus.look_at_gpu, gpus.judge_gpu, "rank"),
    "matmul": Check(
        "known products, and their speed against the median", gpus.look_at_matmul, gpus.judge_matmul, "rank"
    ),
    "kernels": Check("fused DCNv3 against its reference", gpus.look_at_kernels, gpus.judge_kernels, "rank"),
    "shm": Check("shared memory for NCCL and the loader", machine.look_at_shm, machine.judge_shm),
    "open_files": Check("limit of open files", machine.look_at_files, machine.judge_files),
    "locked_memory": Check("limit that InfiniBand needs", machine.look_at_locked, machine.judge_locked),
    "processors": Check("cores for ranks and workers", machine.look_at_processors, machine.judge_processors),
    "reach": Check("TCP between nodes", network.look_at_reach, network.judge_reach, is_together=True),
    "all_reduce": Check(
        "right sums, and bus bandwidth",
        network.look_at_all_reduce,
        network.judge_all_reduce,
        "rank",
        is_together=True,
    ),
    "links": Check(
        "bandwidth from each node to the next",
        network.look_at_links,
        network.judge_links,
        "rank",
        is_together=True,
    ),
    "clock": Check("skew between nodes", clocks.look_at_clock, clocks.judge_clock, is_together=True),
    "recipe": Check(
        "recipe, ds config and ranks fit", recipe.look_at_recipe, recipe.judge_recipe, needs_run=True
    ),
    "memory": Check("of the host, for ranks and workers", machine.look_at_memory, machine.judge_memory),
    "disk": Check(
        "writable, with room for checkpoints", storage.look_at_disk, storage.judge_disk, needs_run=True
    ),
    "shared_folder": Check(
        "--out and --checkpoints are one on all nodes",
        storage.look_at_shared,
        storage.judge_shared,
        needs_run=True,
        is_together=True,
    ),
    "store": Check(
        "an object in --checkpoints behind a URL", storage.look_at_store, storage.judge_store, needs_run=True
    ),
    "data": Check(
        "manifests and shards of every source", recipe.look_at_data, recipe.judge_data, needs_run=True
    ),
}


def chosen(here: Here, has_run: bool) -> Sequence[str]:
    """The checks of this start."""
    names = [name for name, check in CHECKS.items() if has_run or not check.needs_run]
    return [name for name in here.options.chosen(list(CHECKS)) if name in names]
