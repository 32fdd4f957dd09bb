"""Is every GPU there, free, without faults, right and as fast as the others? On a CPU: right, and as fast."""

from __future__ import annotations

import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from pretrain.preflight.check import Here
from pretrain.preflight.same import SMI_SECONDS
from pretrain.preflight.told import FAILED, WARNING, Judged, Place, Problem, Told, span

ORDER = 256  # of the Hadamard matrix: its products are whole numbers that bfloat16 holds exactly
CHECKED_SIDE = {
    "cuda": 4096,
    "cpu": 512,
}  # rows and columns of the product that is compared: all cores take part
TIMED_SIDE = {"cuda": 8192, "cpu": 768}  # of the square product that is timed
ROUNDS = 5  # of timing; the best counts
CPU_SHARE = 0.5  # of the median speed, below which a processor is slow: it has other things to do as well
VERY_SLOW = 0.5  # share of the median below which a GPU fails, where a slow one is a warning
CHECKED_KINDS = ("H stage 3", "T stage 1")  # of the operator: one of each width of a group
THROTTLING = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")


def look_at_gpu(here: Here) -> dict[str, Any] | None:
    """Of this rank's GPU; memory in bytes, its own context included. Faults of the node's GPUs by its first rank."""
    if not here.is_gpu:
        if here.num_gpus:
            raise ValueError(
                f"rank {here.ranks.local_rank} of the node has no GPU, torch sees {torch.cuda.device_count()}: see "
                "nvidia-smi, CUDA_VISIBLE_DEVICES and the driver, or start fewer RANKS"
            )
        return None
    free, total = torch.cuda.mem_get_info(here.device)
    return {
        "name": torch.cuda.get_device_name(here.device),
        "uuid": str(getattr(torch.cuda.get_device_properties(here.device), "uuid", "")),
        "seen": torch.cuda.device_count(),
        "used": total - free - torch.cuda.memory_reserved(here.device),
        "total": total,
        "faults": node_faults() if here.ranks.is_node_first else {},
    }


def node_faults() -> dict[str, list[str]] | None:
    """What nvidia-smi tells of faults of this node's GPUs, by uuid; None where it cannot be asked."""
    try:
        asked = ["nvidia-smi", "-q", "-x"]
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=SMI_SECONDS)
        return faults(done.stdout)
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError):
        return None


def faults(xml: str) -> dict[str, list[str]]:
    """Uncorrected ECC errors, retired pages, rows that wait for a reset and throttling, in `nvidia-smi -q -x`.

    Names of fields are those of drivers 470 to 580; what a GPU does not have is N/A there.
    """
    by_gpu: dict[str, list[str]] = {}
    for number, gpu in enumerate(ElementTree.fromstring(xml).iter("gpu")):
        uuid = gpu.findtext("uuid", "?")
        name, found = f"GPU {number} ({uuid})", by_gpu.setdefault(uuid, [])
        volatile = gpu.find("ecc_errors/volatile")
        for field in volatile.iter() if volatile is not None else ():
            if "uncorrectable" in field.tag and _count(field.text):
                found.append(f"{name}: {field.text} uncorrected ECC errors ({field.tag})")
        for path in (
            "retired_pages/pending_retirement",
            "retired_pages/pending_blacklist",
            "remapped_rows/remapped_row_pending",
        ):
            if (gpu.findtext(path) or "").strip() == "Yes":
                found.append(f"{name}: {path.split('/')[1]}: it wants a reset")
        if (gpu.findtext("remapped_rows/remapped_row_failure") or "").strip() == "Yes":
            found.append(f"{name}: remapped_row_failure: it wants to be replaced")
        for reasons in (gpu.find("clocks_event_reasons"), gpu.find("clocks_throttle_reasons")):
            for field in reasons if reasons is not None else ():
                if field.tag.endswith(THROTTLING) and (field.text or "").strip() == "Active":
                    found.append(f"{name}: throttled ({field.tag.split('reason_')[-1]})")
    return by_gpu


def _count(text: str | None) -> int:
    return int(text) if text and text.strip().isdigit() else 0


def judge_gpu(told: Sequence[Told], here: Here) -> Judged:
    rule = f"one GPU a rank, below {here.options.max_used_gib:g} GiB taken, no ECC error, retired page or throttling"
    problems = []
    owners = Counter((one.place.node, one.value["uuid"]) for one in told if one.value["uuid"])
    models = Counter(one.value["name"] for one in told)
    usual = models.most_common(1)[0][0]
    for one in told:
        value = one.value
        if owners[one.place.node, value["uuid"]] > 1:
            problems.append(
                Problem(
                    one.place, f"shares GPU {value['uuid']} with another rank", "start a rank for each GPU"
                )
            )
        if value["name"] != usual:
            problems.append(
                Problem(
                    one.place,
                    f"{value['name']}, others {usual}",
                    "the slowest sets the pace: use nodes of a kind",
                    status=WARNING,
                )
            )
        if (used := value["used"] / 2**30) > here.options.max_used_gib:
            problems.append(
                Problem(
                    one.place,
                    f"{used:.1f} GiB of the GPU are taken",
                    "end the process that has it (nvidia-smi)",
                )
            )
        if value["faults"] is None:
            problems.append(
                Problem(one.place, "nvidia-smi cannot be asked for faults", "put it on PATH", status=WARNING)
            )
        for fault in _own_faults(one, owners):
            is_throttled = "throttled" in fault
            problems.append(
                Problem(
                    one.place,
                    fault,
                    "look at its cooling and power"
                    if is_throttled
                    else "drain the node, reset or replace the GPU",
                    status=WARNING if is_throttled else FAILED,
                )
            )
    free = {one.place: (one.value["total"] - one.value["used"]) / 2**30 for one in told}
    return Judged(f"{len(told)} x {usual}, {span(free, 'GiB')} free", rule, problems)


def _own_faults(one: Told, owners: Mapping[tuple[int, str], int]) -> list[str]:
    """Faults of GPUs that ranks of this job have: others of a shared node are of other jobs.

    torch tells a uuid without what nvidia-smi puts before it; where one of either cannot be told, all count.
    """
    own = {uuid.removeprefix("GPU-") for node, uuid in owners if node == one.place.node}
    by_gpu = {uuid.removeprefix("GPU-"): found for uuid, found in (one.value["faults"] or {}).items()}
    return [fault for uuid, found in by_gpu.items() for fault in found if uuid in own or not own & {*by_gpu}]


def hadamard(order: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix [order, order] of 1 and -1, symmetric, whose square is order x identity."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def wrong_products(device: torch.device, dtype: torch.dtype) -> int:
    """How many of the numbers of a known product are wrong: all of them are 0 or ORDER, exact in every dtype."""
    repeats = CHECKED_SIDE[device.type] // ORDER
    rows = hadamard(ORDER, dtype, device).repeat(repeats, 1)
    identity = torch.eye(ORDER, dtype=dtype, device=device) * ORDER
    return int((rows @ rows.T != identity.repeat(repeats, repeats)).sum())


def teraflops(device: torch.device, dtype: torch.dtype) -> float:
    """Speed of a square matrix product, TFLOP/s."""
    side = TIMED_SIDE[device.type]
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    best = float("inf")
    for _ in range(ROUNDS + 1):  # the first one warms up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best / 1e12


def look_at_matmul(here: Here) -> dict[str, Any]:
    wrong = {str(dtype): wrong_products(here.device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    speed = teraflops(here.device, torch.bfloat16 if here.is_gpu else torch.float32)
    return {
        "wrong": {dtype: num for dtype, num in wrong.items() if num},
        "teraflops": speed,
        "is_gpu": here.is_gpu,
    }


def judge_matmul(told: Sequence[Told], here: Here) -> Judged:
    share = here.options.min_speed if told[0].value["is_gpu"] else CPU_SHARE
    speeds = {one.place: one.value["teraflops"] for one in told}
    middle = median(speeds.values())
    rule = f"right in float32 and bfloat16, and at least {share:g} of the median {middle:.3g} TFLOP/s"
    problems = [
        Problem(
            one.place,
            f"{num} numbers of a {dtype.removeprefix('torch.')} product are wrong",
            "drain the node: its GPU, memory or processor computes wrongly",
        )
        for one in told
        for dtype, num in one.value["wrong"].items()
    ]
    problems += [
        _slow(one.place, speeds[one.place], middle, one.value["is_gpu"])
        for one in told
        if speeds[one.place] < share * middle
    ]
    return Judged(span(speeds, "TFLOP/s"), rule, problems)


def _slow(place: Place, speed: float, middle: float, is_gpu: bool) -> Problem:
    what = "GPU" if is_gpu else "processor"
    remedy = "see its power limit, clocks and temperature, and what else runs there: all ranks wait for it"
    is_failed = is_gpu and speed < VERY_SLOW * middle
    value = f"slow {what}: {speed:.3g} TFLOP/s, {speed / middle:.0%} of the median"
    return Problem(place, value, remedy, status=FAILED if is_failed else WARNING)


def look_at_kernels(here: Here) -> dict[str, Any] | None:
    """The kernels' own check on a GPU: kinds of the operator that differ from the reference, by error."""
    if not here.is_gpu or (here.run is not None and here.run.backbone.family != "internimage"):
        return None
    from pretrain.kernels.check import KINDS, check
    from pretrain.kernels.dcnv3 import FUSED

    dtype, wrong = torch.bfloat16, {}
    for name in CHECKED_KINDS:
        kind = KINDS[name]
        choice = kind.choice(here.device, dtype)
        if choice.path == FUSED:  # compiles in seconds, and training finds it in the cache
            report = check(kind, here.device, dtype, choice.path)
            if not report.is_close(dtype) or not report.is_repeatable:
                wrong[name] = report.largest
    return {"wrong": wrong}


def judge_kernels(told: Sequence[Told], here: Here) -> Judged:
    problems = [
        Problem(
            one.place,
            f"DCNv3 {name} differs from the reference by {error:.0e}, or does not repeat",
            "run `python -m pretrain.kernels` there; drain the node if others agree",
        )
        for one in told
        for name, error in one.value["wrong"].items()
    ]
    return Judged(f"{len(told)} ranks", "fused DCNv3 equals its reference and repeats", problems)
