"""Which code made this file? Commit of the repository and versions of what it runs on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "transformers")


def commit() -> str | None:
    """Commit of the working tree, with "+changes" if tracked files differ from it, other than results of
    benchmarks, which are its products. Outside git what the variable M3I_COMMIT says, as in an image; else None.
    """
    try:
        head = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("M3I_COMMIT")
    return head + ("+changes" if changes else "")


def _git(*command: str) -> str:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Python and those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> str:
    """Where the numbers were computed, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_told_of_cpu('model name') or 'CPU'}, {os.cpu_count()} cores, {platform.machine()}"


def cpu_model() -> str | None:
    """Family and model number of the processor, which tell generations apart where its name does not, as in a virtual
    machine; None where the kernel does not tell them.
    """
    family, model = _told_of_cpu("cpu family"), _told_of_cpu("model")
    return None if family is None or model is None else f"family {family}, model {model}"


def _told_of_cpu(field: str) -> str | None:
    """What the kernel says of the first processor."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    told = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in told if name.strip() == field), None)
