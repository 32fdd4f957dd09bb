"""Has every node the shared memory, files, locked memory, processors and memory that the run will want?"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.config import Run
from pretrain.data.room import MOST_KEPT
from pretrain.free_memory import available, control_groups
from pretrain.preflight.check import Here
from pretrain.preflight.told import FAILED, WARNING, Judged, Problem, Told, size, span

GIB = 2**30
SHM = Path("/dev/shm")
VIEWS = 2  # of every image, uint8
NCCL_SHM = GIB  # bytes a GPU: NCCL's buffers between GPUs of a node that have no direct way
SHM_GIB = "SHM_GIB"  # environment of jobs/: what is asked for, instead of what is computed
FILES_OF_A_PROCESS = (
    1024  # the loader keeps up to 512 shards open (pretrain/data/sources.py), and their indices
)
FILES_OF_A_RANK = 4  # sockets to each other rank, of NCCL's channels or gloo
INFINIBAND = Path("/sys/class/infiniband")
UNLIMITED = 2.0**63
LOCKED = GIB  # bytes below which a card cannot register its buffers
CAP_IPC_LOCK = 14  # bit of a process' capabilities: no limit on locked memory
RANK_BYTES = 4 * GIB  # of a rank's host memory: libraries, CUDA's context, batches
CPU_RANK_BYTES = GIB  # the same without CUDA
WORKER_BYTES = GIB  # of a decoding process


def batch_bytes(run: Run, world: int) -> int:
    """Of a rank's share of a batch as the loader hands it on."""
    return images_of_rank(run, world) * VIEWS * 3 * run.views.size**2


def images_of_rank(run: Run, world: int) -> int:
    """Of a batch, also where it does not divide, which is told elsewhere."""
    return -(-run.batch // world)


def wanted_shm(here: Here) -> float:
    """Bytes in /dev/shm for this node's ranks."""
    if SHM_GIB in os.environ:
        try:
            return float(os.environ[SHM_GIB]) * GIB
        except ValueError:
            raise ValueError(
                f"{SHM_GIB}={os.environ[SHM_GIB]!r} must be a number of GiB, such as 8"
            ) from None
    nccl = NCCL_SHM if here.is_gpu and here.ranks.local_size > 1 else 0
    workers = here.paths.workers if here.paths else 0
    batches = batch_bytes(here.run, here.ranks.world) * MOST_KEPT * workers if here.run else 0
    return here.ranks.local_size * (nccl + batches)


def files_in_shm(here: Here) -> int:
    """Image files there beside the views, which workers leave to the device; their size is not known yet."""
    if here.run is None or here.run.views.on_device != "all" or SHM_GIB in os.environ:
        return 0
    workers = here.paths.workers if here.paths else 0
    return here.ranks.local_size * MOST_KEPT * workers * images_of_rank(here.run, here.ranks.world)


def look_at_shm(here: Here) -> dict[str, float]:
    return {
        "free": shutil.disk_usage(SHM).free,
        "wanted": wanted_shm(here),
        "files": files_in_shm(here),
    }


def judge_shm(told: Sequence[Told], here: Here) -> Judged:
    needed = {
        one.place: one.value["wanted"] + one.value["files"] * (here.sample_bytes or 0.0) for one in told
    }
    num_files = max(one.value["files"] for one in told)
    problems = [
        Problem(
            one.place,
            f"{size(one.value['free'])} free in {SHM}",
            "start the container with --shm-size or --ipc=host (Kubernetes: an emptyDir of medium Memory there), or "
            "fewer --workers" + (", or --views.on_device colours" if num_files else ""),
        )
        for one in told
        if one.value["free"] < needed[one.place]
    ]
    files = ""
    if num_files:
        each = (
            f"of {here.sample_bytes / 1024:.0f} KiB"
            if here.sample_bytes
            else "that data would tell the size of"
        )
        files = f" and {num_files:g} image files {each}, which views.on_device=all leaves there"
    rule = (
        f"{size(max(needed.values()))} for NCCL and batches of the workers{files} ({SHM_GIB} says otherwise)"
    )
    return Judged(f"{_span(told, 'free')} free", rule, problems)


def _span(told: Sequence[Told], key: str, unit: float = GIB, name: str = "GiB", form: str = ".3g") -> str:
    return span({one.place: one.value[key] / unit for one in told}, name, form)


def look_at_files(here: Here) -> dict[str, float]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {"limit": _unlimited(soft), "hard": _unlimited(hard)}


def _unlimited(limit: int) -> float:
    return UNLIMITED if limit == resource.RLIM_INFINITY else limit


def judge_files(told: Sequence[Told], here: Here) -> Judged:
    wanted = FILES_OF_A_PROCESS + FILES_OF_A_RANK * here.ranks.world
    problems = [
        Problem(
            one.place,
            f"{one.value['limit']:g} open files a process",
            f"ulimit -n {wanted} before the start (hard limit {one.value['hard']:g}), LimitNOFILE of the service",
            status=FAILED if one.value["limit"] < FILES_OF_A_PROCESS else WARNING,
        )
        for one in told
        if one.value["limit"] < wanted
    ]
    return Judged(
        _span(told, "limit", 1, "files", ".6g"), f"{wanted} for shards and sockets to all ranks", problems
    )


def look_at_locked(here: Here) -> dict[str, Any] | None:
    """Bytes that a process may lock; None without InfiniBand, which alone needs it."""
    cards = sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    if not cards:
        return None
    may_all = may_lock(Path("/proc/self/status").read_text())
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {"limit": UNLIMITED if may_all else _unlimited(soft), "cards": cards}


def may_lock(status: str) -> bool:
    """Does a process with this /proc/PID/status lock memory without limit?"""
    line = next((line for line in status.splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    return bool(int(line.split()[1], 16) >> CAP_IPC_LOCK & 1)


def judge_locked(told: Sequence[Told], here: Here) -> Judged:
    problems = [
        Problem(
            one.place,
            f"{one.value['limit'] / 1024:g} KiB may be locked",
            "ulimit -l unlimited (limits.conf, LimitMEMLOCK=infinity of slurmd or the container runtime)",
            status=FAILED if one.value["limit"] < LOCKED else WARNING,
        )
        for one in told
        if one.value["limit"] != UNLIMITED
    ]
    return Judged(f"{len(told)} nodes with InfiniBand", "unlimited, for the cards' buffers", problems)


def look_at_processors(here: Here) -> dict[str, float]:
    return {"cores": usable_cores(), "workers": here.paths.workers if here.paths else 0}


def usable_cores(groups: Sequence[Path] | None = None) -> float:
    """Cores that this process may use: of its affinity, or of a control group's quota if that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    for group in control_groups() if groups is None else groups:
        if (limit := group / "cpu.max").is_file():
            quota, _, period = limit.read_text().strip().partition(" ")
            cores = cores if quota == "max" else min(cores, int(quota) / int(period))
    return cores


def judge_processors(told: Sequence[Told], here: Here) -> Judged:
    from pretrain.data.workers import MOST_A_CORE  # here: it imports the decoders

    ranks, problems = here.ranks.local_size, []
    for one in told:
        cores, workers = one.value["cores"], int(one.value["workers"])
        value = f"{cores:g} cores for {ranks} ranks with {workers} workers each"
        if workers > MOST_A_CORE * cores:
            problems.append(Problem(one.place, value, "lower --workers: the loader refuses so many"))
        elif ranks * (workers + 1) > cores:
            remedy = "ask for more cores (--cpus-per-task), or lower --workers"
            problems.append(Problem(one.place, value, remedy, status=WARNING))
    wanted = ranks * (int(told[0].value["workers"]) + 1)
    return Judged(_span(told, "cores", 1, "cores"), f"{wanted}: one a rank and one a worker", problems)


def look_at_memory(here: Here) -> dict[str, float]:
    workers = here.paths.workers if here.paths else 0
    own = RANK_BYTES if here.is_gpu else CPU_RANK_BYTES
    return {
        "available": available(Path("/proc/meminfo").read_text(), control_groups()),
        "wanted": here.ranks.local_size * (own + workers * WORKER_BYTES),
    }


def judge_memory(told: Sequence[Told], here: Here) -> Judged:
    model = here.model["host"] * here.ranks.local_size if here.model else 0.0  # bytes of a rank
    wanted = max(one.value["wanted"] for one in told) + model
    problems = [
        Problem(
            one.place,
            f"{size(one.value['available'])} of memory are free",
            "end what else runs there, ask for more memory (--mem), or fewer --workers",
            status=WARNING,  # what a rank takes is estimated
        )
        for one in told
        if one.value["available"] < one.value["wanted"] + model
    ]
    rule = f"{size(wanted)} for ranks, workers and copies of checkpoints"
    return Judged(f"{_span(told, 'available')} free", rule, problems)
