"""How does a process meet the other ranks?"""

from __future__ import annotations

import atexit
import gc
import os
import socket
from datetime import timedelta
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler as deepspeed_compiler

from pretrain.exits import RankLost


def start_distributed(timeout: float = 1800.0) -> torch.device:
    """Joins the process group that the launcher's environment describes, or makes one of this process alone.

    A collective call that takes longer than `timeout` seconds fails. gloo without CUDA or where DS_ACCELERATOR=cpu
    says so, NCCL otherwise. Returns the device of this rank. RankLost when the others do not come in that time,
    ConnectionError when the address or its port cannot be used.
    """
    atexit.register(gc.unfreeze)  # at the end all is freed, or Triton's binding tells of hundreds of leaks
    gc.freeze()  # what is imported stays: collections, of which DeepSpeed asks for some, need not look at it
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind((alone["MASTER_ADDR"], 0))
            os.environ.update(alone, MASTER_PORT=str(free.getsockname()[1]))
    # On a CPU DeepSpeed would compile shared-memory collectives first: minutes, a compiler, and, after a kill
    # meanwhile, a lock file for which every later start waits forever. gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Thousands of ranges a step, half a microsecond each, which Nsight Systems alone shows; it sets this variable.
    deepspeed.utils.nvtx.enable_nvtx = "NSYS_PROFILING_SESSION_ID" in os.environ
    _import_muon()
    device = torch.device("cpu")
    if get_accelerator().device_name() == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    try:
        deepspeed.init_distributed(
            auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout)
        )
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "timed out" in str(error).lower():
            raise RankLost(_told_of_the_late(place, timeout, error)) from error
        raise ConnectionError(
            f"the ranks cannot meet at {place} ({str(error).splitlines()[0]}): if another run uses that port, start "
            "by jobs/local/pretrain.sh, which finds a free one, or give the launcher --master_port"
        ) from error
    return device


def _import_muon() -> None:
    """DeepSpeed imports this optimizer, which no run here has, with its first engine, and compiles parts of it:
    that imports inductor, a quarter of what a start takes, also in runs that compile nothing.
    """
    with patch.object(deepspeed_compiler, "compile", lambda: lambda function: function):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401


def _told_of_the_late(place: str, timeout: float, error: dist.DistError) -> str:
    """For one rank of this machine to tell; the machines that are there cannot know which is not."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return ""
    return (
        f"not all {os.environ['WORLD_SIZE']} ranks came to {place} in {timeout:.0f} s "
        f"({str(error).splitlines()[0]}): "
        "look which machine has not started, or cannot reach that address; the same command starts again"
    )
