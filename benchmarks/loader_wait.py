"""How long does a training step wait for data when the loader could make 1.2 times what the trainer takes?

    OMP_NUM_THREADS=1 python benchmarks/loader_wait.py [--images 600] [--steps 200] [--surplus 1.2] [--workers 1]

First the loader alone: how many images a second reach a trainer that asks at once. Then a trainer whose steps take the
time of `surplus` times as many images a second (asleep, as a CPU is while a GPU works); a data set of few photos makes
it pass many ends of epochs. Writes benchmarks/results/loader_wait.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.loader import build  # noqa: E402
from benchmarks.record import keep  # noqa: E402
from pretrain.config import Run, Source  # noqa: E402
from pretrain.data.loader import Loader  # noqa: E402
from pretrain.objectives import OBJECTIVES  # noqa: E402

BATCH = 32
WARM = 10  # steps before the clock starts


def waits(run: Run, folder: Path, workers: int, steps: int, step_seconds: float) -> list[float]:
    """Seconds that each step waits."""
    found = []
    loader = Loader(run, {"photos": folder}, None, rank=0, world=1, workers=workers)
    with closing(loader):
        for _ in islice(loader, WARM):
            time.sleep(step_seconds)
        for _ in range(steps):
            begun = time.perf_counter()
            next(loader)
            found.append(time.perf_counter() - begun)
            time.sleep(step_seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--surplus", type=float, default=1.2)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(
        name="wait",
        objective=OBJECTIVES["m3i"],
        data={"photos": Source("category")},
        batch=BATCH,
        steps=10**6,
    )
    with tempfile.TemporaryDirectory() as place:
        folder, _ = build(Path(place), 340, 256, options.images)
        free = waits(run, folder, options.workers, options.steps, 0.0)
        possible = BATCH * len(free) / sum(free)
        step_seconds = options.surplus * BATCH / possible
        found = waits(run, folder, options.workers, options.steps, step_seconds)
        epoch = [found[k] for k in range(len(found)) if (k + WARM) * BATCH % options.images < BATCH]
    keep(
        "loader_wait",
        "goal, reached or not: a step waits at most 1 % of its time for data when the loader could make 1.2 times as "
        "many images",
        torch.device("cpu"),
        workers=options.workers,
        steps=options.steps,
        surplus=options.surplus,
        images_a_second_possible=round(possible, 1),
        images_a_second_taken=round(possible / options.surplus, 1),
        step_milliseconds=round(1000 * step_seconds, 1),
        wait_share=round(sum(found) / (sum(found) + step_seconds * len(found)), 5),
        wait_milliseconds={
            "median": round(1000 * statistics.median(found), 3),
            "99 percent": round(1000 * sorted(found)[int(0.99 * len(found))], 3),
            "most": round(1000 * max(found), 3),
            "median at ends of epochs": round(1000 * statistics.median(epoch), 3),
            "most at ends of epochs": round(1000 * max(epoch), 3),
        },
    )


if __name__ == "__main__":
    main()
