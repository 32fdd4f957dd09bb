"""Does a build end with the same bytes when it is killed at random moments, on disk and on an S3 store that refuses?

    OMP_NUM_THREADS=1 python benchmarks/builder_drill.py [--kills 20] [--seed 0] [--seconds 180]

A builder of 200 scenes in 20 shards gets SIGKILL again and again, a moment after a shard (both drawn from a seed),
and is started again, until it was killed so many times or the seconds of that store are over; a start that gets to
its end, and every fourth kill, ends a round, and the next begins anew. On disk it has two workers; on S3 one, and
25 % of all requests of any kind, of the builder and of this script, are refused with 503. After every kill whatever
has a final name must be whole, and no manifest may be there while a shard is missing; after every round all bytes
must be those of an undisturbed build. Writes benchmarks/results/builder_drill.json.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import keep  # noqa: E402
from data_prep.places import Place, place_of  # noqa: E402
from tests.data.s3 import s3_store  # noqa: E402

SCENES = ["scenes", "--count", "200", "--heldout", "0", "--size", "96", "--shard-size", "10"]
NUM_SHARDS = 20
LATEST = 0.3  # seconds that it may go on after the shard that was waited for
ALL_METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")
ROUND = 4  # kills after which a builder may come to its end
LOOK = {True: 0.02, False: 0.2}  # on disk or not -> seconds between two looks at what is there
HANGS = 300.0  # seconds after which a builder that does not end counts as stuck


def start(place: Place, workers: int) -> subprocess.Popen[bytes]:
    """A builder in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "data_prep",
        "build",
        *SCENES,
        "--workers",
        str(workers),
        "--out",
        str(place),
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def contents(place: Place, below: str = "") -> dict[str, bytes]:
    """Every file by its relative name, but for what a build in progress keeps for itself."""
    files = {below + name: place.read(name) for name in place.names() if not name.endswith(".tmp")}
    for folder in place.folders():
        if folder != ".build" and not folder.endswith(".tmp"):
            files |= contents(place.child(folder), f"{below}{folder}/")
    return files


def wait_for_shards(process: subprocess.Popen[bytes], place: Place, num_shards: int) -> None:
    """Until so many shards are there, or the builder ended."""
    while process.poll() is None and len(place.names("*.tar")) < num_shards:
        time.sleep(LOOK[place.local is not None])


def wait_for_end(process: subprocess.Popen[bytes]) -> None:
    try:
        told = process.communicate(timeout=HANGS)[1].decode()
    except subprocess.TimeoutExpired:
        process.kill()
        raise SystemExit(f"a builder that nobody killed did not end in {HANGS:g} s") from None
    if process.returncode:
        raise SystemExit(f"a builder that nobody killed failed: {told[-500:]}")


def drill(
    place: Place, workers: int, kills: int, seconds: float, moments: random.Random, truth: dict[str, bytes]
) -> dict[str, object]:
    """Kills builders, up to so many and so long, and ends the last round; SystemExit when something is wrong."""
    killed = rounds = in_the_middle = 0
    began = time.monotonic()
    while killed < kills and time.monotonic() - began < seconds:
        out = place.child(f"round-{rounds}")
        for _ in range(min(ROUND, kills - killed)):
            process = start(out, workers)
            try:
                wait_for_shards(process, out.child("train"), moments.randrange(NUM_SHARDS + 1))
                process.wait(moments.uniform(0.0, LATEST))
                wait_for_end(process)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            killed += 1
            found = contents(out.child("train"))
            in_the_middle += 0 < sum(name.endswith(".tar") for name in found) < NUM_SHARDS
            wrong = [
                name for name, content in found.items() if name.endswith(".tar") and content != truth[name]
            ]
            if wrong or ("manifest.json" in found and found.keys() < truth.keys()):
                raise SystemExit(
                    f"after kill {killed} {wrong or 'the manifest'} is not what it must be in {out}"
                )
        wait_for_end(start(out, workers))
        if contents(out.child("train")) != truth or out.child("train").folders() != ["tokenizer"]:
            raise SystemExit(f"{out} differs from an undisturbed build")
        rounds += 1
    return {
        "kills": killed,
        "kills_with_some_shards_finished": in_the_middle,
        "rounds": rounds,
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=180.0, help="of each store, after which no round begins"
    )
    arguments = parser.parse_args()
    moments, most = random.Random(arguments.seed), (arguments.kills, arguments.seconds)
    with tempfile.TemporaryDirectory() as name, s3_store() as store:
        os.environ.update(store.environment)
        undisturbed = place_of(Path(name) / "undisturbed")
        wait_for_end(start(undisturbed, 2))
        truth = contents(undisturbed.child("train"))
        on_disk = drill(place_of(Path(name) / "set"), 2, *most, moments, truth)
        print("disk", on_disk, flush=True)
        store.faults.refused, store.faults.methods = 0.25, ALL_METHODS
        on_s3 = drill(place_of("s3://bucket/set"), 1, *most, moments, truth)
        print("s3", on_s3, flush=True)
        refused = round(store.faults.num_refused / store.faults.num_requests, 3)
    keep(
        "builder_drill",
        "builders killed at random moments end with the bytes of an undisturbed build",
        torch.device("cpu"),
        seed=arguments.seed,
        files=len(truth),
        disk=on_disk,
        s3={**on_s3, "refused_share": refused},
    )


if __name__ == "__main__":
    main()
