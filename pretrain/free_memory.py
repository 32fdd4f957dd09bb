"""How much memory may processes here still take?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def control_groups(own: str | None = None, root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """Folders of this process' control group (version 2) and of those above it, each of which limits it.

    `own` is /proc/self/cgroup: Slurm's steps and systemd's services lie deep, a container sees its own as `root`.
    """
    if own is None:
        own = Path("/proc/self/cgroup").read_text()
    path = next((line.removeprefix("0::/") for line in own.splitlines() if line.startswith("0::/")), "")
    inside = Path(path)
    if ".." in inside.parts or not (root / inside).is_dir():  # another name space than that of the mount
        inside = Path()
    return [root / above for above in (inside, *inside.parents)] if inside.parts else [root]


def available(meminfo: str, groups: Sequence[Path]) -> int:
    """Bytes that processes here may still take: of the machine, or of a control group of theirs if that is less."""
    free = _told(meminfo, "MemAvailable")
    for group in groups:
        limit, used = group / "memory.max", group / "memory.current"
        if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
            cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            free = min(free, int(text) - int(used.read_text()) + int(cached.get("inactive_file", 0)))
    return free


def whole(meminfo: str, groups: Sequence[Path]) -> int:
    """Bytes of the machine, or that a control group may have in all if that is less: no process gets more."""
    limits = [limit.read_text().strip() for group in groups if (limit := group / "memory.max").is_file()]
    return min([_told(meminfo, "MemTotal"), *(int(limit) for limit in limits if limit != "max")])


def _told(meminfo: str, name: str) -> int:
    """Bytes that a line of /proc/meminfo tells."""
    found = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)
    return int(found[name].split()[0]) * 1024
