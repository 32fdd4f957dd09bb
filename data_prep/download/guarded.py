"""How does img2dataset download with our fetch? Its sharder, threads and writer are kept, one function is replaced.

Imported in the processes of img2dataset alone, never by the builder. It is a callable around img2dataset's Downloader
because its workers are spawned: a patch in the parent would not reach them, but a pickled `Guarded` imports this
module in every worker, of a pool, of Ray and of Spark alike. Why not a filtering proxy: it would have to break TLS to
see redirects, headers and sizes. Why not RLIMIT_AS: threads and arrow map far more than they use.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.download.connect import Failed
from data_prep.download.fetch import Policy, fetch
from data_prep.download.watch import ROWS_DONE

# webdataset imports torch where it is installed, img2dataset imports wandb and albumentations; none is used for raw
# bytes, and each process would pay four seconds, 300 MB and a call to PyPI (albumentations) for them.
sys.modules.setdefault("torch", None)
for unused in ("wandb", "albumentations"):
    sys.modules.setdefault(unused, types.ModuleType(unused))

import img2dataset.downloader as engine  # noqa: E402


@dataclass(frozen=True)
class Guarded:
    """img2dataset's Downloader of one shard, with every URL fetched by `fetch` under `policy`."""

    downloader: engine.Downloader
    policy: Policy

    def __call__(self, shard: tuple[int, str]) -> tuple[bool, tuple[int, str]]:
        """(whether it says that it went well, the shard): nobody believes the first."""
        done = Path(self.downloader.output_folder, ROWS_DONE)
        done.mkdir(exist_ok=True)
        ticks = os.open(done / f"{os.uname().nodename}-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def download(row: tuple[int, str], **_: Any) -> tuple[int, io.BytesIO | None, str | None]:
            key, url = row
            try:
                return key, io.BytesIO(fetch(url, self.policy)), None
            except Failed as failed:
                return key, None, str(failed)
            except Exception as error:  # one odd row must not cost its shard; the log has the rest
                traceback.print_exc()
                return key, None, f"unexpected: {type(error).__name__}: {error}"[:200]
            finally:
                os.write(ticks, b".")

        engine.download_image_with_retry = download
        try:
            return self.downloader(shard)
        finally:
            os.close(ticks)
