"""What do the ranks tell each other? Sums, means, rows and errors; no-ops without torch.distributed."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of `values` over the ranks, in a new tensor without gradient."""
    total = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of `values` over the ranks, in a new tensor without gradient."""
    return sum_over_ranks(values) / world_size()


def from_first_rank(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, told to all ranks; an OSError or ValueError of it is raised by all of them.

    A collective call. An error of rank 0 alone would leave the others waiting for it.
    """
    outcome: list[Any] = [None, None]
    problem = None
    if rank() == 0:
        try:
            outcome[0] = work()
        except (OSError, ValueError) as error:
            outcome[1], problem = sendable(error), error
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    problem = problem or outcome[1]
    if problem is not None:
        raise problem
    return outcome[0]


def sendable(error: OSError | ValueError) -> OSError | ValueError:
    """The error, or an OSError or ValueError of its text where it is not the same after pickling, as a library's."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # a constructor that wants other arguments may fail by anything
        pass
    return (OSError if isinstance(error, OSError) else ValueError)(str(error))


def from_every_rank(own: Sequence[T]) -> list[T]:
    """What the ranks have to tell, one after the other; usually nothing, which costs them one number.

    A collective call, of a process group that reduces on the CPU.
    """
    if world_size() == 1 or not sum_over_ranks(torch.tensor(len(own))):
        return list(own)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(own))
    return [one for part in parts for one in part]


def on_every_rank(work: Callable[[], T]) -> T:
    """What `work` returns on this rank; an OSError or ValueError on one of them ends it on all, with its message.

    A collective call, as from_every_rank. An error of one rank alone would leave the others waiting for it.
    """
    try:
        outcome, problem = work(), None
    except (OSError, ValueError) as error:
        outcome, problem = None, error
    told = from_every_rank([] if problem is None else [str(problem)])
    if problem is not None and told[0] == str(problem):
        raise problem
    if told:
        raise ValueError(told[0]) from problem
    return outcome


def to_first_rank(own: T) -> list[T] | None:
    """What the ranks have, in their order, on rank 0; None on the others. A collective call."""
    if world_size() == 1:
        return [own]
    parts: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(own, parts)
    return parts


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks one after the other, [world * n, ...], without gradient; n is equal on all ranks."""
    rows = rows.detach().contiguous()
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)
