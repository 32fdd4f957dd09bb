"""Which rank tells an error that all of them have, and whose fault is it?"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def is_told_by_this_rank(error: Exception) -> bool:
    """True on the first rank that fails with this message, so that what all ranks find wrong is told once."""
    if not dist.is_initialized():
        return rank_of_launcher() == 0 or isinstance(
            error, ConnectionError
        )  # which node fails to meet matters
    try:
        return dist.distributed_c10d._get_default_store().add(f"told/{error}", 1) == 1
    except (RuntimeError, ValueError):  # rank 0 hosts the store: it has told its error and gone
        return False


def rank_of_launcher() -> int:
    """This process's rank as the launcher says it, also before the process group exists."""
    return int(os.environ.get("RANK", "0"))


def is_of_device(error: RuntimeError) -> bool:
    """Did this rank's GPU fail, so that another start, perhaps elsewhere, may do? Too little memory is no such."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def is_of_another_rank(error: RuntimeError) -> bool:
    """Did a collective call fail since a rank, or the way to it, is gone?"""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))
