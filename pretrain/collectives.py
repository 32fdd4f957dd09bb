"""What do the ranks tell each other? Sums, means, gradients, rows and errors; no-ops without torch.distributed."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

BUCKET = 2**25  # numbers of gradients that are averaged at once


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


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its mean over the ranks; one that no rank has stays None. A collective call.

    After the whole backward pass: batch norms call the other ranks within it, and calls of two kinds at once could
    meet in another order on each rank.
    """
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    holders = sum_over_ranks(torch.tensor([parameter.grad is not None for parameter in trained]).long())
    bucket: list[nn.Parameter] = []
    for parameter, num_holders in zip(trained, holders.tolist(), strict=True):
        if not num_holders:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and sum(one.numel() for one in bucket) + parameter.numel() > BUCKET:
            _average(bucket)
            bucket = []
        bucket.append(parameter)
    _average(bucket)


def _average(parameters: list[nn.Parameter]) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joined)
    joined /= world_size()
    for gradient, mean in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


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


def from_every_rank(own: Sequence[T], device: torch.device | str = "cpu") -> list[T]:
    """What the ranks have to tell, one after the other; usually nothing, which costs them one number.

    A collective call, of a process group that reduces on the `device`.
    """
    if world_size() == 1 or not sum_over_ranks(torch.tensor(len(own), device=device)):
        return list(own)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(own))
    return [one for part in parts for one in part]


def on_every_rank(work: Callable[[], T], device: torch.device | str = "cpu") -> T:
    """What `work` returns on this rank; an OSError or ValueError of one of them is raised by all.

    A collective call, as from_every_rank. An error of one rank alone would leave the others waiting for it.
    """
    try:
        outcome, problem = work(), None
    except (OSError, ValueError) as error:
        outcome, problem = None, error
    told = from_every_rank([] if problem is None else [sendable(problem)], device)
    if problem is not None and str(told[0]) == str(problem):
        raise problem
    if told:
        raise told[0] from problem
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


def all_rows(own: Tensor) -> Tensor:
    """Rows of all ranks one after the other, without gradient; a rank may have any number of them, or none.

    A collective call.
    """
    if world_size() == 1:
        return own.detach()
    counts = gather_rows(torch.tensor([len(own)])).tolist()
    if not max(counts):
        return own.detach()
    filled = torch.cat([own.detach(), own.new_zeros(max(counts) - len(own), *own.shape[1:])])
    parts = gather_rows(filled).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def rows_of(own: Tensor, source: int, count: int) -> Tensor:
    """The `count` rows that rank `source` has, on all ranks; elsewhere `own` tells their shape. A collective call."""
    if world_size() == 1:
        return own
    rows = own.detach().contiguous() if rank() == source else own.new_empty(count, *own.shape[1:])
    dist.broadcast(rows, source)
    return rows
