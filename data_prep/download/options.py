"""How shall images be downloaded? Options that any source of URLs takes; each has one effect and one range."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

from data_prep.download.fetch import Policy
from data_prep.limits import Limits

IMG2DATASET = "1.47.0"  # whose functions the engine replaces
DISTRIBUTORS = {
    "multiprocessing": "img2dataset",
    "ray": "ray",
    "pyspark": "pyspark",
}  # name -> package it needs


@dataclass(frozen=True)
class Download:
    """How to download a list of URLs."""

    raw_shard_size: int = 10_000  # rows of a raw shard, which becomes one finished shard; frozen once begun
    threads: int = 64  # downloads at a time in one process
    timeout: float = 10.0  # seconds of silence of a server
    deadline: float = 60.0  # seconds for one row in all: redirects, retries, pauses
    retries: int = 2  # of a row whose failure may pass: 429, 5xx, resets, time-outs
    user_agent: str = Policy.user_agent  # header of every request
    robot: str = Policy.robot  # our name in X-Robots-Tag headers
    allow_private: tuple[str, ...] = ()  # networks that are not public and may be reached, "10.0.0.0/8"
    limits: Limits = field(default_factory=Limits)  # of a good image; max_bytes also ends a download
    keep_raw: bool = False  # keep the raw tars after their shards are finished
    # download all that the build lacks before its first shard; needs disk for all raw images
    ahead: bool = False
    processes: int = 1  # of img2dataset; more with `ahead` only, else every build worker runs one
    # of img2dataset, with `ahead`; else the workers of the build are distributed, by its engine
    distributor: Literal["multiprocessing", "ray", "pyspark"] = "multiprocessing"
    run_shards: int = 100  # raw shards of one run of img2dataset with `ahead`
    stall: float = 300.0  # seconds without a finished row, file or byte until a run is killed
    shard_deadline: float = 4 * 3600.0  # seconds that one raw shard may take
    reruns: int = 2  # of a run that left something out, before it is tried in small pieces
    # bytes that a process of a run may hold; more ends the run, and the next has half the threads
    run_memory: int = 4 * 2**30
    min_free: int = 2**30  # bytes of disk that stay free
    # fraction of a shard's rows that may fail for passing reasons; more is the fault of our own network
    outage: float = 0.5

    def __post_init__(self) -> None:
        for name in ("raw_shard_size", "threads", "processes", "run_shards"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least 1: pass --{name.replace('_', '-')} 1 or more"
                )
        for name in ("retries", "reruns", "min_free"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative: pass 0 or more")
        if not 0 < self.timeout <= self.deadline < self.stall <= self.shard_deadline:
            raise ValueError(
                f"timeout={self.timeout}, deadline={self.deadline}, stall={self.stall}, "
                f"shard_deadline={self.shard_deadline} must rise in this order from above 0 (a run would be killed"
                " while a row is still allowed to wait): raise the later ones"
            )
        if not 0 < self.outage <= 1:
            raise ValueError(f"outage={self.outage} must lie in (0, 1]: pass --outage 0.5")
        if not self.ahead and (self.processes > 1 or self.distributor != "multiprocessing"):
            raise ValueError(
                f"processes={self.processes}, distributor={self.distributor!r} have an effect with ahead only: pass"
                " --ahead, or use more --workers of the build, each of which downloads its own shard"
            )
        for text in self.allow_private:
            try:
                ipaddress.ip_network(text)
            except ValueError as error:
                raise ValueError(f"allow_private: {error}; pass networks such as 10.0.0.0/8") from error

    def policy(self) -> Policy:
        """What the fetch needs to know."""
        return Policy(
            timeout=self.timeout,
            deadline=self.deadline,
            retries=self.retries,
            max_bytes=self.limits.max_bytes,
            user_agent=self.user_agent,
            robot=self.robot,
            networks=self.allow_private,
        )


def require_engine(options: Download) -> None:
    """ModuleNotFoundError unless img2dataset and the package of the distributor can be started here."""
    try:
        found = version("img2dataset")
    except PackageNotFoundError:
        found = "none"
    if found != IMG2DATASET:
        raise ModuleNotFoundError(
            f"img2dataset {found} is installed, downloads need {IMG2DATASET}: pip install img2dataset=={IMG2DATASET}"
        )
    if find_spec("imghdr") is None:
        raise ModuleNotFoundError(
            "img2dataset needs the module imghdr, which Python 3.13 removed: use Python 3.12"
        )
    package = DISTRIBUTORS[options.distributor]
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"distributor={options.distributor!r} needs {package}: pip install {package}, or use multiprocessing"
        )
