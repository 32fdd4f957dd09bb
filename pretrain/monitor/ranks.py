"""What do the ranks tell each other at a logged step? Times, memory, counts and losses, each in one collective."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from pretrain.clock import PARTS
from pretrain.collectives import gather_rows, mean_over_ranks, sum_over_ranks, world_size
from pretrain.host import host_name
from pretrain.scoring import Each

OWN = ("data_wait", "forward", "teacher")  # parts before a rank waits for the others' gradients
CLEARLY = 1.1  # times the median of the ranks: who takes longer than that is told
MEMORY = ("allocated", "reserved", "host")


@dataclass(frozen=True)
class Sources:
    """Which source an image is of, by its position in the run's order."""

    names: tuple[str, ...]
    cycle: Int[Tensor, " c"]  # number of the source at every position, repeated for ever


def hosts() -> list[str]:
    """Name of every rank's machine. A collective call."""
    names: list[Any] = [host_name()]
    if world_size() > 1:
        names = [None] * world_size()
        dist.all_gather_object(names, host_name())
    return names


def mean_scalars(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean over ranks of every scalar, with one wait for the device."""
    flat = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, mean_over_ranks(flat).tolist(), strict=True))


def sum_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Sum over ranks of what any of them counts."""
    of_ranks: list[dict[str, int]] = [dict(counts)]
    if world_size() > 1:
        of_ranks = [{} for _ in range(world_size())]
        dist.all_gather_object(of_ranks, dict(counts))
    reasons = sorted({reason for of_rank in of_ranks for reason in of_rank})
    return {reason: sum(of_rank.get(reason, 0) for of_rank in of_ranks) for reason in reasons}


def nats_by_source(each: Mapping[str, Each], sources: Sources) -> dict[str, dict[str, float]]:
    """By target and source, the mean over the images of the global batch that count; sources without any are absent.

    Weighted by how many those are, the means of a target's sources give its loss.
    """
    if not each:
        return {}
    sums = torch.stack([_sums(one, sources) for one in each.values()])
    told: dict[str, dict[str, float]] = {}
    for target, (nats, counts) in zip(each, sum_over_ranks(sums).tolist(), strict=True):
        pairs = zip(sources.names, nats, counts, strict=True)
        told[target] = {name: total / count for name, total, count in pairs if count}
    return {target: of_source for target, of_source in told.items() if of_source}


def _sums(each: Each, sources: Sources) -> Tensor:
    """[2, sources]: nats of the images that count, and their number, on this rank; float64."""
    cycle = sources.cycle.to(each.position.device)
    source = cycle[each.position % len(cycle)]
    counts = each.counts.double()
    values = torch.stack([torch.where(each.counts, each.nats.double(), 0.0), counts])
    sums = torch.zeros(2, len(sources.names), dtype=torch.float64, device=values.device)
    return sums.index_add_(1, source, values)


def memory() -> dict[str, int]:
    """Bytes: most that this rank has allocated and reserved on its GPU, and held as a process."""
    on_gpu = torch.cuda.is_available()
    return {
        "allocated": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def resources(seconds: Mapping[str, float], device: torch.device, machines: list[str]) -> dict[str, Any]:
    """`seconds` of a step by part, mean over ranks; `memory_bytes`, most of any; `slowest`, where one stands out.

    A rank's own time is that before it waits for the gradients of the others. Under ZeRO-3 ranks wait for one another
    at every block, so that only data waits tell them apart.
    """
    held = memory()
    mine = [*(seconds[part] for part in PARTS), *(held[name] for name in MEMORY)]
    table = gather_rows(torch.tensor([mine], dtype=torch.float64, device=device)).cpu()
    times, bytes_held = table[:, : len(PARTS)], table[:, len(PARTS) :].amax(0).long().tolist()
    told: dict[str, Any] = {
        "seconds": dict(zip(PARTS, times.mean(0).tolist(), strict=True)),
        "memory_bytes": {name: n for name, n in zip(MEMORY, bytes_held, strict=True) if n},
    }
    if found := slowest(times[:, [PARTS.index(part) for part in OWN]].sum(1).tolist(), machines):
        told["slowest"] = found
    return told


def slowest(own: list[float], machines: list[str]) -> dict[str, Any] | None:
    """The rank with the longest of so many own seconds, if that is clearly longer than what is usual."""
    median, longest = statistics.median_low(own), max(own)
    if longest <= CLEARLY * median:
        return None
    place = own.index(longest)
    return {"rank": place, "host": machines[place], "seconds": longest, "median_seconds": median}
