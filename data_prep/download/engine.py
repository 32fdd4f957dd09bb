"""How does img2dataset run? As `python -m data_prep.download.engine job.json`, in a process group of its own.

Started by `watch.py` only. It dies with its supervisor: standard input is a pipe whose other end the supervisor
holds, and when that closes, for whatever reason, the whole group is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from data_prep.download import guarded
from data_prep.download.fetch import Policy

img2dataset = import_module("img2dataset.main")  # after `guarded`; the package has a function of that name


def main(path: str) -> None:
    """Run the job that `path` describes; its outcome is what lies on disk, not an exit code."""
    threading.Thread(target=_die_with_supervisor, daemon=True).start()
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    policy = Policy(**{**job["policy"], "networks": tuple(job["policy"]["networks"])})
    make_downloader = img2dataset.Downloader
    img2dataset.Downloader = lambda **options: guarded.Guarded(make_downloader(**options), policy)
    img2dataset.LoggerProcess = _no_logger  # one process less: the supervisor reads the same files
    if job["processes"] == 1:  # no pool that could wait for a dead worker
        img2dataset.multiprocessing_distributor = _in_this_process
    img2dataset.download(
        url_list=job["input"],
        output_folder=job["output"],
        input_format="parquet",
        output_format="webdataset",
        url_col="url",
        save_additional_columns=["row"],
        number_sample_per_shard=job["shard_size"],
        processes_count=job["processes"],
        thread_count=job["threads"],
        distributor=job["distributor"],
        disable_all_reencoding=True,  # raw bytes: `check_image` judges and converts, img2dataset damages
        resize_mode="no",
        extract_exif=False,
        compute_hash="sha256",
        incremental_mode="incremental",
        max_shard_retry=0,  # the supervisor decides
        enable_wandb=False,
    )


def _die_with_supervisor() -> None:
    while os.read(0, 1024):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _no_logger(*_: Any) -> Any:
    class Silent:
        done_shards: frozenset[int] = frozenset()
        start = join = terminate = staticmethod(lambda: None)

    return Silent()


def _in_this_process(_: int, downloader: guarded.Guarded, reader: Iterable, *__: Any) -> None:
    for shard in reader:
        downloader(shard)


if __name__ == "__main__":
    main(sys.argv[1])
