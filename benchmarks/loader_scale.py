"""How long does the loader take to start on a data set of LAION-400M's size, and to find a sample in it?

    python benchmarks/loader_scale.py [--shards 41455] [--samples 10000]

The manifest is whole, the shards are empty files of their size (sparse: they take no room): all happens but the
reading of samples. Each start is that of a fresh process, imports not counted. Positions are timed in CPU seconds,
a start in both: on a machine that others use they differ. Writes its results to benchmarks/results/loader_scale.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import keep  # noqa: E402
from data_prep.schema import SAMPLE_BYTES, Manifest, Shard, write_manifest  # noqa: E402
from pretrain.config import Run, Source  # noqa: E402
from pretrain.data.loader import Loader  # noqa: E402
from pretrain.data.order import Order  # noqa: E402
from pretrain.data.sources import open_sources  # noqa: E402
from pretrain.data.steps import run_order  # noqa: E402
from pretrain.objectives import OBJECTIVES  # noqa: E402

FOUND = 20_000  # positions that are looked up
START = "--start"  # what the script says to the process that it times


def write_set(folder: Path, shards: int, samples: int) -> None:
    """A manifest of so many shards of so many samples each, and empty files."""
    size = samples * SAMPLE_BYTES
    digest = hashlib.sha256(bytes(size)).hexdigest()
    recorded = tuple(Shard(f"{number:06d}.tar", samples, size, digest) for number in range(shards))
    for shard in recorded:
        with (folder / shard.name).open("wb") as file:
            file.truncate(size)
    categories = ("one", "two")
    total = shards * samples
    write_manifest(folder, Manifest("laion", "train", categories, total, False, True, recorded))


def memory(what: str) -> float:
    """MiB of this process, as Linux counts them."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) / 1024


def seconds_of(order: Order, positions: Iterable[int]) -> float:
    """CPU seconds."""
    begun = time.process_time()
    for position in positions:
        order[position]
    return time.process_time() - begun


def start(folder: Path) -> dict[str, float]:
    """Times one start in this process, and looks for samples."""
    run = Run(
        name="scale", objective=OBJECTIVES["m3i"], data={"laion": Source("category")}, batch=4096, steps=10**6
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    begun, cpu_begun = time.perf_counter(), time.process_time()
    loader = Loader(run, {"laion": folder}, None, rank=0, world=1)
    started, cpu_started = time.perf_counter() - begun, time.process_time() - cpu_begun
    peak = memory("VmHWM")
    loader.close()
    sources = open_sources(run, {"laion": folder}, None, slice(0))
    order, shards = run_order(run, sources), sources.opened[0].shards
    first = seconds_of(order, [0])
    many = seconds_of(order, range(1, FOUND + 1)) / FOUND
    window = run.mixing.window * shards.shard_sizes[0]
    borders = [seconds_of(order, [number * window]) for number in range(1, 6)]
    epoch = seconds_of(order, [len(shards)])
    return {
        "start_seconds": started,
        "start_cpu_seconds": cpu_started,
        "mebibytes_before": before,
        "mebibytes_taken": peak - before,
        "first_position_seconds": first,
        "position_seconds": many,
        "position_in_a_new_window_seconds": statistics.median(borders),
        "position_in_a_new_epoch_seconds": epoch,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=41_455)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(START, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start)))
        return
    with tempfile.TemporaryDirectory() as place:
        write_set(Path(place), options.shards, options.samples)
        rounds = []
        for _ in range(options.rounds):
            command = [sys.executable, __file__, START, place]
            told = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, env={**os.environ, "M3I_CACHE": f"{place}/cache"}
            )
            rounds.append(json.loads(told.stdout))
            print(rounds[-1], flush=True)
    medians = {name: round(statistics.median(found[name] for found in rounds), 8) for name in rounds[0]}
    keep(
        "loader_scale",
        "goals, reached or not: a start on 41,455 shards of 10,000 samples takes less than 5 s and 500 MiB beside "
        "the imports, the next position less than 10 microseconds on the mean; one in a new window takes longer",
        torch.device("cpu"),
        shards=options.shards,
        samples_a_shard=options.samples,
        rounds=options.rounds,
        medians=medians,
    )


if __name__ == "__main__":
    main()
