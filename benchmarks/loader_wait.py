"""How long does a training step wait for data when the loader could make 1.2 times what the trainer takes?

    OMP_NUM_THREADS=1 python benchmarks/loader_wait.py [--images 600] [--surplus 1.2] [--workers 1]

A trainer whose steps take `surplus` times as long as the loader took to make the last batches (asleep, as a CPU is
while a GPU works; the pace follows the loader, because machines are shared), and one whose steps all take
`surplus` times the mean of the loader's batches just before, which a machine that slows down makes wait. Images are
340 x 256 JPEG files and get two views of the recipe `m3i.vit_b16` at 224 px, as in benchmarks/loader.py: M3I itself
would make the second one of every other image alone. A data set of few photos makes it pass many ends of epochs.
Writes benchmarks/results/loader_wait.json.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import statistics
import sys
import tarfile
import tempfile
import time
from collections import deque
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.loader import SIDES, build  # noqa: E402
from benchmarks.record import keep  # noqa: E402
from data_prep.headers import MAX_PIXELS, MAX_WEBP_PIXELS  # noqa: E402
from data_prep.pixels import EXIF_ORIENTATION  # noqa: E402
from pretrain.config import Run, Source  # noqa: E402
from pretrain.data.loader import Loader  # noqa: E402
from pretrain.data.measure import peak_bytes_of  # noqa: E402
from pretrain.objectives import OBJECTIVES  # noqa: E402
from pretrain.recipes import load  # noqa: E402
from tests.data.sets import write_set  # noqa: E402

BATCH = 32
FILES = "340 x 256"  # pixels of the photos
LARGE = 256  # images a step, for the memory of a worker
FREE, WARM, PACED = 40, 15, 280  # steps: without pause, until the workers are ahead again, measured
RECENT = 4  # batches whose making says how fast the loader is now


def measured_run() -> Run:
    """Images with two views of the recipe that benchmarks/loader.py measures, with a mask and a category each."""
    recipe = load("m3i.vit_b16")
    objective, data = OBJECTIVES["m3i_without_mixing"], {"photos": Source("category")}
    return Run(name="wait", objective=objective, data=data, views=recipe.views, batch=BATCH, steps=10**6)


def work(loader: Loader) -> float:
    """Seconds of the workers so far."""
    return sum(loader.seconds.values())


def follow(
    loader: Loader, num_steps: int, surplus: float, overhead: float
) -> tuple[list[float], list[float]]:
    """Seconds that each step waits, and how long it takes: `surplus` times what the loader took for recent batches,
    `overhead` seconds each included."""
    found, lengths, recent = [], [], deque([0.0], maxlen=RECENT)
    for _ in range(num_steps):
        before, begun = work(loader), time.perf_counter()
        batch = next(loader)
        found.append(time.perf_counter() - begun)
        recent.append(work(loader) - before)
        lengths.append(surplus * (sum(recent) / len(recent) + overhead))
        time.sleep(lengths[-1])
        del batch  # giving its memory back is no waiting
    return found, lengths


def steady(loader: Loader, num_steps: int, length: float) -> float:
    """Share of the time that a trainer waits whose steps take `length` seconds each."""
    waited = 0.0
    for _ in range(num_steps):
        begun = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - begun
        time.sleep(length)
        del batch
    return waited / (waited + num_steps * length)


def with_huge(folder: Path, photos: Path) -> Path:
    """A data set of the photos' first shard, among them one image of each form that is as large as may be."""
    turned = Image.Exif()
    turned[EXIF_ORIENTATION] = 6
    soft = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8))
    huge = []
    for form, most in (("jpg", MAX_PIXELS), ("png", MAX_PIXELS), ("webp", MAX_WEBP_PIXELS)):
        image, file = soft.resize((math.isqrt(most),) * 2), io.BytesIO()
        image.convert("RGB" if form == "jpg" else "RGBA").save(
            file, "JPEG" if form == "jpg" else form, exif=turned
        )
        huge.append({form: file.getvalue(), "cls": b"0"})
    with tarfile.open(photos / "000000.tar") as tar:
        jpegs = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    members = [*({"jpg": jpeg, "cls": b"0"} for jpeg in jpegs[: LARGE - len(huge)]), *huge]
    return write_set(folder, [members])


def peak(run: Run, folder: Path, workers: int) -> int:
    """MiB that a worker held at most, of a slow trainer: as many batches as it may hold."""
    with closing(Loader(run, {"photos": folder}, None, rank=0, world=1, workers=workers)) as loader:
        follow(loader, 6, 3.0, 0.0)
        assert not loader.dropped, loader.dropped
        working = [child.pid for child in multiprocessing.active_children()]
        return round(max(found for found in map(peak_bytes_of, working) if found is not None) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--surplus", type=float, default=1.2)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = measured_run()
    with tempfile.TemporaryDirectory() as place:
        folder, _ = build(Path(place), *SIDES[FILES], options.images)
        loader = Loader(run, {"photos": folder}, None, rank=0, world=1, workers=options.workers)
        with closing(loader):
            follow(loader, WARM, 0.0, 0.0)
            before, begun = work(loader), time.perf_counter()
            follow(loader, FREE, 0.0, 0.0)
            free = (time.perf_counter() - begun) / FREE
            overhead = max(free - (work(loader) - before) / FREE / options.workers, 0.0)
            follow(loader, WARM, options.surplus / options.workers, overhead)
            first = loader.num_images
            found, lengths = follow(loader, PACED, options.surplus / options.workers, overhead)
            begun = time.perf_counter()
            follow(loader, FREE, 0.0, 0.0)
            again = (time.perf_counter() - begun) / FREE
            steady(loader, WARM, options.surplus * again)
            steady_share = steady(loader, PACED, options.surplus * again)
            places = [(first + k * BATCH) % options.images for k in range(PACED)]
            at_ends = [wait for wait, at in zip(found, places, strict=True) if at + BATCH > options.images]
        large = replace(run, batch=LARGE)
        peaks = {f"{LARGE} images a step": peak(large, folder, options.workers)}
        peaks[f"{LARGE} images a step, the largest images among them"] = peak(
            large, with_huge(Path(place) / "huge", folder), options.workers
        )
    keep(
        "loader_wait",
        "goal, reached or not: a step waits at most 1 % of its time for data when the loader could make 1.2 times as "
        "many images",
        torch.device("cpu"),
        workers=options.workers,
        files=FILES,
        view=run.views.size,
        views_an_image=1 + sum(run.objective.needs_other_view()) / run.objective.input.mixed,
        steps=PACED,
        surplus=options.surplus,
        images_a_second_without_pause=round(BATCH / free, 1),
        milliseconds_beside_the_work=round(1000 * overhead, 2),
        step_milliseconds=round(1000 * statistics.mean(lengths), 1),
        wait_share=round(sum(found) / (sum(found) + sum(lengths)), 5),
        steady={
            "images_a_second_without_pause": round(BATCH / again, 1),
            "step_milliseconds": round(1000 * options.surplus * again, 1),
            "wait_share": round(steady_share, 5),
        },
        wait_milliseconds={
            "median": round(1000 * statistics.median(found), 3),
            "most": round(1000 * max(found), 3),
            "median at ends of epochs": round(1000 * statistics.median(at_ends), 3),
            "most at ends of epochs": round(1000 * max(at_ends), 3),
        },
        worker_peak_mebibytes=peaks,
    )


if __name__ == "__main__":
    main()
