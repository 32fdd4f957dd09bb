"""How many images a second does one core finish into shards, and in how much memory, against img2dataset?

    OMP_NUM_THREADS=1 python benchmarks/shard_builder.py --peer-python PYTHON [--images 4000] [--rounds 2]

PYTHON is one that has img2dataset 1.47.0. Both read the same photo-like JPEGs of 500 x 375 px from disk (img2dataset
by file:// URLs), reduce the short side to 256 px, each by its own filter, whose nearness to Lanczos is told, and
write tars of JPEGs at quality 95, in as many processes (--workers). Turn about; a rate is that of the images between
a short run and a long one, so that starting up does not count, per second of processor time of all processes: a busy
machine changes the clock on the wall more. Memory is the sum of proportional set sizes over all processes at its
peak. Ours also judges and hashes every image, and is timed where it keeps the bytes as they are, by one process too:
two share caches, and on many machines the two threads of one core. Writes benchmarks/results/shard_builder.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import keep  # noqa: E402

WIDTH, HEIGHT, SHORT_SIDE = 500, 375, 256  # pixels
DISTINCT = 500  # images; more are the same ones under other names
LOOK = 0.05  # seconds between two looks at the memory


@dataclass(frozen=True)
class Run:
    """What one run of a program took."""

    wall: float  # seconds
    processor: float  # seconds, of all its processes
    peak: int  # bytes, of all its processes together


def photograph(seed: int) -> bytes:
    """A JPEG of quality 90 and about 45 kB: clouds of four sizes and some grain."""
    draw = np.random.default_rng(seed)
    picture = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for cells, strength in ((4, 70), (16, 35), (64, 14), (200, 6)):
        cloud = draw.normal(0, strength, (max(2, HEIGHT * cells // WIDTH), cells, 3)).astype(np.float32)
        picture += cv2.resize(cloud, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    picture += draw.normal(120, 2.0, picture.shape).astype(np.float32)
    return simplejpeg.encode_jpeg(picture.clip(0, 255).astype(np.uint8), quality=90, colorsubsampling="420")


def lay_out(folder: Path, num_images: int) -> Path:
    """A folder of so many images, of which DISTINCT differ."""
    folder.mkdir()
    for number in range(num_images):
        path = folder / f"{number:06d}.jpg"
        if number < DISTINCT:
            path.write_bytes(photograph(number))
        else:
            os.link(folder / f"{number % DISTINCT:06d}.jpg", path)
    return folder


def ours(images: Path, out: Path, workers: int, short_side: int) -> list[str]:
    """The command that builds a data set."""
    command = [sys.executable, "-m", "data_prep", "build", "folder", "--from", str(images), "--out", str(out)]
    return [*command, "--short-side", str(short_side), "--workers", str(workers), "--shard-size", "500"]


def theirs(python: str, images: Path, out: Path, workers: int) -> list[str]:
    """The command that lets img2dataset do the same."""
    table = out.with_suffix(".txt")
    table.write_text("".join(f"{path.as_uri()}\n" for path in sorted(images.iterdir())))
    options = {
        "url_list": table,
        "input_format": "txt",
        "output_folder": out,
        "output_format": "webdataset",
        "processes_count": workers,
        "thread_count": 8,
        "image_size": SHORT_SIDE,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "encode_quality": 95,
        "extract_exif": False,
        "number_sample_per_shard": 500,
        "enable_wandb": False,
    }
    program = str(Path(python).with_name("img2dataset"))
    return [program, *(f"--{name}={value}" for name, value in options.items())]


def measure(command: list[str]) -> Run:
    """Runs a command to its end; RuntimeError when it fails."""
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONPATH": str(ROOT)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with watched(process.pid) as peaks:
        told = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed: {told.decode()[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(time.perf_counter() - began, processor, max(peaks))


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        listed = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it ended
        return []
    return [pid, *(below for children in listed for child in children for below in family(int(child)))]


def proportional_bytes(pid: int) -> int:
    """Memory of a process, of which shared pages count in part; 0 when it ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))


@contextlib.contextmanager
def watched(pid: int) -> Iterator[list[int]]:
    """Bytes that a process and its children had at every look, until the block ends."""
    ended, sums = threading.Event(), [0]

    def look() -> None:
        while not ended.wait(LOOK):
            sums.append(sum(map(proportional_bytes, family(pid))))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield sums
    finally:
        ended.set()
        thread.join()


def rates(short: Run, long: Run, num_images: int) -> dict[str, float]:
    """Images a second between a short and a long run, and the peak of the long one."""
    return {
        "images_per_processor_second": round(num_images / (long.processor - short.processor), 1),
        "images_per_second": round(num_images / (long.wall - short.wall), 1),
        "peak_mebibytes": round(long.peak / 2**20),
    }


def stored(folder: Path) -> dict[int, np.ndarray]:
    """Pictures of the first tar by the number of the image that they come from."""
    found, numbers = {}, {}
    with tarfile.open(min(folder.rglob("*.tar"))) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            content = tar.extractfile(member).read()
            if extension == "jpg":
                found[key] = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            elif extension == "json":
                record = json.loads(content)
                numbers[key] = int(Path(record.get("source_name") or record["url"]).stem)
    return {numbers[key]: picture for key, picture in found.items()}


def nearness(folder: Path) -> float:
    """Decibels between what is stored and Pillow's Lanczos filter on the original: mean over 50 images."""
    decibels = []
    for number, picture in sorted(stored(folder).items())[:50]:
        original = Image.open(io.BytesIO(photograph(number)))
        size = (picture.shape[1], picture.shape[0])
        wanted = np.asarray(original.resize(size, Image.Resampling.LANCZOS)).astype(np.float32)
        decibels.append(10 * np.log10(255**2 / np.mean((picture - wanted) ** 2)))
    return round(float(np.mean(decibels)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    runs: dict[str, list[tuple[Run, Run]]] = {
        name: [] for name in ("ours", "img2dataset", "ours_kept", "ours_kept_alone")
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        short, long = (
            lay_out(folder / "short", DISTINCT),
            lay_out(folder / "long", DISTINCT + arguments.images),
        )
        for number in range(arguments.rounds):
            for who in runs:
                pair = []
                for images in (short, long):
                    out = folder / f"{who}-{images.name}-{number}"
                    if who == "img2dataset":
                        command = theirs(arguments.peer_python, images, out, arguments.workers)
                    else:
                        side = SHORT_SIDE if who == "ours" else 0
                        workers = 1 if who == "ours_kept_alone" else arguments.workers
                        command = ours(images, out, workers, side)
                    pair.append(measure(command))
                runs[who].append((pair[0], pair[1]))
                print(who, rates(*pair, arguments.images), flush=True)
        near = {who: nearness(folder / f"{who}-short-0") for who in ("ours", "img2dataset")}
    best = {
        who: max(
            (rates(*pair, arguments.images) for pair in pairs),
            key=lambda one: one["images_per_processor_second"],
        )
        for who, pairs in runs.items()
    }
    ratio = best["ours"]["images_per_processor_second"] / best["img2dataset"]["images_per_processor_second"]
    keep(
        "shard_builder",
        "finalise and write against img2dataset: at least 1.2x the images a core at lower memory; 1,000 kept a core",
        torch.device("cpu"),
        image=f"{WIDTH} x {HEIGHT} px JPEG, short side to {SHORT_SIDE} px",
        num_images=arguments.images,
        workers=arguments.workers,
        load_before=round(load, 2),
        best=best,
        ratio=round(ratio, 2),
        decibels_from_lanczos=near,
        runs={who: [[asdict(run) for run in pair] for pair in pairs] for who, pairs in runs.items()},
    )


if __name__ == "__main__":
    main()
