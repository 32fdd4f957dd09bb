"""What does supervision cost? `data_prep.download` against plain img2dataset 1.47.0, from the same loopback server.

    OMP_NUM_THREADS=1 python benchmarks/downloads.py [--images 6000] [--rounds 3]

Photo-like JPEGs of 500 x 375 pixels (quality 90, 56 kB) by an asyncio server in a process of its own. Both sides
store raw bytes (`disable_all_reencoding`) with sha256, 1,000 rows a shard, one process of 32 threads, turn about.
`supervised` is `downloaded` with `ahead`: it fetches under deadlines, byte caps and address checks, and reads all
of it again to verify it. `plain` imports torch, wandb and albumentations in three processes; in `plain, torch hidden`
torch cannot be imported, as in an environment without it. `processor_seconds` are of client processes only, user and
system; `start` is the same with one image, which `milliseconds_an_image` leaves out. The server answers at once; then
once more after 0.3 s, as the internet does, for a quarter of the images.
Writes benchmarks/results/downloads.json.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_prep.download import Download, downloaded  # noqa: E402
from data_prep.download.watch import resident  # noqa: E402
from data_prep.plan import shard_ranges  # noqa: E402
from tests.data_prep.download.lists import describe, rows_of  # noqa: E402

SHARD, THREADS = 1000, 32
WAITS = {0.0: 1.0, 0.3: 0.25}  # seconds that the server waits -> share of the images
PHOTOS = 32  # different ones


def serve(photos: list[bytes], wait: float, told: Connection) -> None:
    """Answer every request with a photo, for ever."""
    replies = [
        b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
        % (len(photo), photo)
        for photo in photos
    ]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1]
        if wait:
            await asyncio.sleep(wait)
        writer.write(replies[int(line.rpartition(b"/")[2]) % len(replies)])
        await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def plain(urls: list[str], folder: Path, hidden: str = "") -> int:
    """Images that img2dataset stores by itself; the module `hidden` cannot be imported."""
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    if hidden:
        (folder / "hidden").mkdir()
        (folder / "hidden" / f"{hidden}.py").write_text("raise ModuleNotFoundError('hidden')\n")
        environment["PYTHONPATH"] = str(folder / "hidden")
    table = pa.table({"url": urls, "row": list(range(len(urls)))})
    pq.write_table(table, folder / "input.parquet")
    options = {
        "url_list": folder / "input.parquet",
        "output_folder": folder / "out",
        "input_format": "parquet",
        "output_format": "webdataset",
        "save_additional_columns": '["row"]',
        "number_sample_per_shard": SHARD,
        "processes_count": 1,
        "thread_count": THREADS,
        "disable_all_reencoding": True,
        "resize_mode": "no",
        "extract_exif": False,
        "compute_hash": "sha256",
    }
    command = [sys.executable, "-c", "from img2dataset import main; main()"]
    subprocess.run(
        command + [f"--{name}={value}" for name, value in options.items()],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )
    return sum(
        sum(status == "success" for status in pq.read_table(path)["status"].to_pylist())
        for path in (folder / "out").glob("*.parquet")
    )


def supervised(urls: list[str], folder: Path) -> int:
    """Images that we verify after our engine stored them."""
    options = Download(
        raw_shard_size=SHARD,
        threads=THREADS,
        ahead=True,
        keep_raw=True,
        min_free=0,
        allow_private=("127.0.0.1/32",),
    )
    rows = rows_of(folder / "rows", urls, part_size=100_000)
    collection = downloaded(rows, folder / "work", options, describe, name="urls", split="train", settings={})
    collection.prepare(shard_ranges(collection, 1))
    return collection.items.store.counts()["good"]


def measured(do: Callable[[list[str], Path], int], urls: list[str]) -> dict[str, float]:
    """Seconds, processor seconds and the peak of resident bytes of what `do` starts, for all these images."""
    over, peak = threading.Event(), [0]

    def look() -> None:
        while not over.wait(0.2):
            children = subprocess.run(
                ["ps", "-o", "sid=", "--ppid", str(multiprocessing.current_process().pid)],
                capture_output=True,
                text=True,
            ).stdout.split()
            peak[0] = max([peak[0], *(sum(resident(int(group))) for group in set(children))])

    thread = threading.Thread(target=look)
    with tempfile.TemporaryDirectory() as folder:
        thread.start()
        before, began = _processor(), time.perf_counter()
        stored = do(urls, Path(folder))
        seconds, processor = time.perf_counter() - began, _processor() - before
        over.set()
        thread.join()
    if stored != len(urls):
        raise RuntimeError(f"a side stored {stored} of {len(urls)} images: the measurement is void")
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "peak_mib": round(peak[0] / 2**20),
    }


def _processor() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


SIDES = {"plain": plain, "plain, torch hidden": partial(plain, hidden="torch"), "supervised": supervised}


def compare(photos: list[bytes], num_images: int, rounds: int, wait: float) -> dict[str, dict[str, float]]:
    """The best of each side, from a server that waits so many seconds."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(
        target=serve, args=(photos, wait, theirs), daemon=True
    )
    server.start()
    port = ours.recv()
    urls = [f"http://127.0.0.1:{port}/{number}" for number in range(num_images)]
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for side, do in SIDES.items():
            for name, some in ((f"{side}, start", urls[:1]), (side, urls)):
                one = measured(do, some)
                former = best.get(name, one)
                best[name] = {what: min(one[what], former[what]) for what in one}
    server.terminate()
    for side in SIDES:
        busy = best[side]["processor_seconds"] - best[f"{side}, start"]["processor_seconds"]
        best[side]["images_per_second"] = round(num_images / best[side]["seconds"])
        best[side]["milliseconds_an_image"] = round(1000 * busy / num_images, 2)
    return best


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    from benchmarks.loader import photo
    from benchmarks.record import keep

    photos = [photo(500, 375, seed) for seed in range(PHOTOS)]
    results = {
        f"server waits {wait} s": compare(photos, int(asked.images * share), asked.rounds, wait)
        for wait, share in WAITS.items()
    }
    for name, found in results.items():
        for side, one in found.items():
            print(f"{name}: {side}: {one}")
    keep(
        "downloads",
        "raw images downloaded from a loopback server under supervision, and by img2dataset 1.47.0 alone",
        torch.device("cpu"),
        images=asked.images,
        rounds=asked.rounds,
        bytes_an_image=sum(map(len, photos)) // len(photos),
        threads_of_a_process=THREADS,
        results=results,
    )


if __name__ == "__main__":
    main()
