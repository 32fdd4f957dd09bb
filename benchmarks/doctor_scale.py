"""How much memory and time do stats, leakage and a diff of samples take for a million samples?

`python benchmarks/doctor_scale.py FOLDER [SAMPLES ...]`: makes data sets of so many tiny samples with random recorded
perceptual hashes in FOLDER (2.6 kB each), runs the commands on each, and tells the most memory and the processor's
seconds; the slope between two sizes is what a sample takes.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import keep
from data_prep.files import sha256_file
from data_prep.index import index_bytes
from data_prep.samples import Sample, members
from data_prep.schema import Manifest, Shard, write_manifest

A_SHARD = 10_000  # samples
NUM_PICTURES = 10_000  # of the evaluation set
CHILD = """
import re, sys, time
from pathlib import Path
from data_prep.__main__ import main
code = main(sys.argv[1:])
print(code, time.process_time(), re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
SIZES = (50_000, 150_000)


def _make(folder: Path, num: int, seed: int) -> None:
    """A data set of `num` samples without a pixel of interest."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 255, (16, 24, 3), np.uint8)).save(buffer, "JPEG", quality=10)
    shards = []
    for start in range(0, num, A_SHARD):
        path, offsets, parts = folder / f"{start // A_SHARD:06d}.tar", [0], []
        for number in range(start, min(num, start + A_SHARD)):
            record = {
                "phash": f"{int(generator.integers(0, 2**64, dtype=np.uint64)):016x}",
                "NSFW": "UNLIKELY",
                "similarity": 0.3 + float(generator.random()) / 10,
            }
            image = buffer.getvalue() + str((seed, number)).encode()
            sample = Sample(
                f"k-{number:09d}", image, "jpg", (24, 16), (f"a few words of number {number}",), record=record
            )
            for extension, content in members(sample):
                header = tarfile.TarInfo(f"{sample.key}.{extension}")
                header.size = len(content)
                parts += [header.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % 512)]
            offsets.append(sum(map(len, parts[-9:])) + offsets[-1])
        path.write_bytes(b"".join(parts) + bytes(1024))
        path.with_name(path.name + ".idx").write_bytes(index_bytes(offsets))
        shards.append(Shard(path.name, len(offsets) - 1, path.stat().st_size, sha256_file(path)))
    write_manifest(folder, Manifest("fake", "train", (), num, True, False, tuple(shards)))


def _measure(command: list[str]) -> dict[str, float]:
    """Processor seconds of a command in one process, and the most memory it had.

    That is VmHWM, since the resource usage of a child starts at what its parent had.
    """
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *command], capture_output=True, text=True, check=True
    )
    code, seconds, peak = child.stdout.split()[-3:]
    return {
        "CPU seconds": round(float(seconds), 1),
        "MiB": round(int(peak) / 1024),
        "exit code": int(code),
    }


def main(folder: Path, sizes: list[int]) -> None:
    """Make, run, tell and keep."""
    evaluation = folder / f"evaluation-{NUM_PICTURES}"
    if not evaluation.exists():
        _make(evaluation, NUM_PICTURES, 1)
    commands: dict[str, Callable[[Path], list[str]]] = {
        "stats": lambda place: ["stats", str(place), "--workers", "1"],
        "stats without near duplicates": lambda place: [
            "stats",
            str(place),
            "--workers",
            "1",
            "--distance",
            "-1",
        ],
        "leakage": lambda place: ["leakage", str(place), "--against", str(evaluation), "--workers", "1"],
        "diff": lambda place: ["diff", str(place), str(evaluation), "--samples", "--workers", "1"],
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for size in sizes:
        place = folder / f"fake-{size}"
        if not place.exists():
            _make(place, size, 2)
        for name, command in commands.items():
            found.setdefault(name, {})[str(size)] = _measure(command(place))
            print(name, size, found[name][str(size)], flush=True)
    small, large = (str(size) for size in (sizes[0], sizes[-1]))
    slopes = {
        name: {
            unit: round((by[large][unit] - by[small][unit]) / (sizes[-1] - sizes[0]) * 1e6, 1)
            for unit in ("CPU seconds", "MiB")
        }
        for name, by in found.items()
    }
    print("for a million more samples:", slopes)
    keep(
        "doctor_scale",
        "memory and time of the commands that look after data sets, one process, recorded perceptual hashes",
        torch.device("cpu"),
        evaluation=NUM_PICTURES,
        measured=found,
        for_a_million_more=slopes,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(text) for text in sys.argv[2:]] or list(SIZES)) if sys.argv[
        1:
    ] else sys.exit(__doc__)
