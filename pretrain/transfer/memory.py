"""How does a transfer end that asks for more memory than there is? With a word, which the system's end is without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from pretrain.free_memory import available, control_groups
from pretrain.limited_memory import at_most, data_bytes
from pretrain.preflight.ranks import ranks_of
from pretrain.transfer.order import share_of
from pretrain.transfer.recipes import Detect, Segment

MARGIN = 1 / 16  # of the memory that is available: for what else runs here, and what readers' processes add
# What torch and the C++ library say of it on a CPU, in errors that have no class of their own.
WORDS = ("can't allocate memory", "out of memory", "bad_alloc")
# What oneDNN says of it, and of much else: it fails so within 10 MiB of a limit.
ONEDNN = ("could not create a primitive", "could not execute a primitive")
NEAR = 2**26, 1 / 16  # bytes, or the share of all that was free: what is freed on the way from such a failure


@contextmanager
def within_memory(recipe: Segment | Detect, name: str, device: torch.device) -> Iterator[None]:
    """Within it a CPU's process takes no more than its part of the memory that is available now.

    What asks for more, there or of a GPU, is a ValueError that tells what the recipe `name` asks. Where the system
    tells no memory or takes no limit, there is none.
    """
    is_cpu = device.type == "cpu"
    room = free_for_this_rank() if is_cpu else torch.cuda.mem_get_info(device)[0]
    limit = None
    try:
        with at_most(room) if is_cpu and room is not None else nullcontext() as limit:
            yield
    except (MemoryError, RuntimeError) as error:
        is_near = limit is not None and limit - data_bytes() <= max(NEAR[0], NEAR[1] * room)
        if not is_out_of_memory(error, is_near=is_near):
            raise
        there = "unknown bytes" if room is None else f"{room / 2**30:.1f} GiB"
        others = " or more memory, or a GPU" if is_cpu else ", or a GPU of more memory"
        raise ValueError(
            f"--recipe {name} shows {share_of(recipe.optimisation)} images of {recipe.size} x {recipe.size} pixels a "
            f"step on this rank, and {there} of memory were free for it on {device}, which do not suffice "
            f"({str(error).partition(chr(10))[0]}): choose a smaller recipe, such as small, or give it more ranks"
            f"{others}"
        ) from error


def free_for_this_rank() -> int | None:
    """Bytes of this host's memory, or of its control group's, that are this rank's part; None where nothing tells."""
    try:
        free = available(Path("/proc/meminfo").read_text(), control_groups())
    except (OSError, KeyError, ValueError):  # another system, or one that hides it
        return None
    return max(int(free * (1 - MARGIN)) // ranks_of().local_size, 0)


def is_out_of_memory(error: BaseException, *, is_near: bool) -> bool:
    """Does an error say that there is no memory left, of the host or of a device? `is_near` is a limit of the host's,
    without which oneDNN's words have another reason.
    """
    kinds = (MemoryError, torch.OutOfMemoryError)
    words = WORDS + ONEDNN if is_near else WORDS
    return isinstance(error, kinds) or any(word in str(error) for word in words)
