"""How many samples a second does Grain read, and decode? `python grain_rate.py DATA NUM`, as JSON.

Grain has no reader of tar files: the source below reads a sample by its offsets and takes it apart with tarfile. Runs
in an environment of its own (`benchmarks/loader_peers.py` makes it); one process, no workers.
"""

import bisect
import io
import itertools
import json
import os
import sys
import tarfile
import time
from pathlib import Path

import grain
import numpy as np
import simplejpeg


class TarSource:
    def __init__(self, folder: Path) -> None:
        tars = sorted(folder.glob("*.tar"))
        self._offsets = [np.fromfile(f"{tar}.idx", dtype="<u8") for tar in tars]
        self._ends = list(itertools.accumulate(len(offsets) - 1 for offsets in self._offsets))
        self._files = [os.open(tar, os.O_RDONLY) for tar in tars]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict:
        shard = bisect.bisect_right(self._ends, index)
        offsets = self._offsets[shard]
        place = index - self._ends[shard] + len(offsets) - 1
        start, end = int(offsets[place]), int(offsets[place + 1])
        record = io.BytesIO(os.pread(self._files[shard], end - start, start))
        with tarfile.open(fileobj=record, mode="r|") as tar:
            return {member.name.partition(".")[2]: tar.extractfile(member).read() for member in tar}


def main(folder: str, num: int) -> None:
    dataset = grain.MapDataset.source(TarSource(Path(folder))).shuffle(seed=0).repeat(None)
    samples = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
    rates = {}
    for what, work in (
        ("read", lambda content: None),
        ("decode", lambda content: simplejpeg.decode_jpeg(content)),
    ):
        next(samples)
        begun = time.perf_counter()
        for _ in range(num):
            work(next(samples)["jpg"])
        rates[what] = num / (time.perf_counter() - begun)
    print(json.dumps(rates))


main(sys.argv[1], int(sys.argv[2]))
