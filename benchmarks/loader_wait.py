"""How long does a training step wait for data when the loader could make 1.2 times what the trainer takes?

    OMP_NUM_THREADS=1 python benchmarks/loader_wait.py [--images 600] [--rounds 7] [--surplus 1.2] [--workers 1]

In turn, because machines are shared: how many images a second the loader makes for a trainer that asks at once, then
a trainer whose steps take `surplus` times as long (asleep, as a CPU is while a GPU works). A data set of few photos
makes it pass many ends of epochs. Writes benchmarks/results/loader_wait.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.loader import build  # noqa: E402
from benchmarks.record import keep  # noqa: E402
from pretrain.config import Run, Source  # noqa: E402
from pretrain.data.batch import Batch  # noqa: E402
from pretrain.data.loader import Loader  # noqa: E402
from pretrain.data.measure import peak_bytes_of  # noqa: E402
from pretrain.objectives import OBJECTIVES  # noqa: E402

BATCH = 32
LARGE = 256  # images a step, for the memory of a worker
FREE, WARM, PACED = 20, 15, 40  # steps of a round: without pause, until the workers are ahead again, measured


def waits(batches: Iterator[Batch], num_steps: int, step_seconds: float) -> list[float]:
    """Seconds that each step waits."""
    found = []
    for _ in range(num_steps):
        begun = time.perf_counter()
        batch = next(batches)
        found.append(time.perf_counter() - begun)
        time.sleep(step_seconds)
        del batch  # giving its memory back is no waiting
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--surplus", type=float, default=1.2)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    objective, data = OBJECTIVES["m3i"], {"photos": Source("category")}
    run = Run(name="wait", objective=objective, data=data, batch=BATCH, steps=10**6)
    rounds, all_waits, at_ends = [], [], []
    with tempfile.TemporaryDirectory() as place:
        folder, _ = build(Path(place), 340, 256, options.images)
        loader = Loader(run, {"photos": folder}, None, rank=0, world=1, workers=options.workers)
        with closing(loader):
            waits(loader, WARM, 0.0)
            for _ in range(options.rounds):
                possible = BATCH * FREE / sum(waits(loader, FREE, 0.0))
                step = options.surplus * BATCH / possible
                waits(loader, WARM, step)
                first = loader.num_images
                found = waits(loader, PACED, step)
                places = [(first + k * BATCH) % options.images for k in range(PACED)]
                at_ends += [
                    wait for wait, at in zip(found, places, strict=True) if at + BATCH > options.images
                ]
                all_waits += found
                rounds.append((possible, step, sum(found) / (sum(found) + step * PACED)))
                print(f"possible {possible:.0f} images/s, waits {100 * rounds[-1][2]:.2f} %", flush=True)
        large = replace(run, batch=LARGE)
        loader = Loader(large, {"photos": folder}, None, rank=0, world=1, workers=options.workers)
        with closing(loader):
            waits(loader, 6, 0.0)
            working = [child.pid for child in multiprocessing.active_children()]
            peaks = [peak for peak in map(peak_bytes_of, working) if peak is not None]
    keep(
        "loader_wait",
        "goal, reached or not: a step waits at most 1 % of its time for data when the loader could make 1.2 times as "
        "many images",
        torch.device("cpu"),
        workers=options.workers,
        rounds=options.rounds,
        steps_a_round=PACED,
        surplus=options.surplus,
        images_a_second_possible=[round(possible, 1) for possible, *_ in rounds],
        step_milliseconds=[round(1000 * step, 1) for _, step, _ in rounds],
        wait_shares=[round(share, 5) for *_, share in rounds],
        worker_peak_mebibytes={f"{LARGE} images a step": round(max(peaks) / 2**20)} if peaks else {},
        median_wait_share=round(statistics.median(share for *_, share in rounds), 5),
        wait_milliseconds={
            "median": round(1000 * statistics.median(all_waits), 3),
            "most": round(1000 * max(all_waits), 3),
            "median at ends of epochs": round(1000 * statistics.median(at_ends), 3),
            "most at ends of epochs": round(1000 * max(at_ends), 3),
        },
    )


if __name__ == "__main__":
    main()
