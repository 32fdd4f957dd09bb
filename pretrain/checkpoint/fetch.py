"""How do the weights of a checkpoint behind a URL become files on this machine?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from data_prep.files import write_atomic
from pretrain.checkpoint.stores import PIECE, store_at
from pretrain.intact import COMPLETE, flush
from pretrain.place import leads_out

BIG = ("student/", "teacher/", "optimizer/", "random/")


def fetched(url: str, which: str, folder: Path) -> Path:
    """`folder` with what is needed of a checkpoint to read its student or teacher, copied unless it is there.

    A reader compares it with its COMPLETE; OSError when the store or the disk fails, ValueError for a name that leads
    out of the folder.
    """
    store, done = store_at(url), folder / which / COMPLETE
    mark = bytes(store.read(COMPLETE))
    if done.is_file() and done.read_bytes() == mark:
        return folder
    skipped = tuple(name for name in BIG if name != f"{which}/")
    sizes = {name: size for name, size in store.sizes().items() if not name.startswith(skipped)}
    if outside := [name for name in sizes if leads_out(name)]:
        raise ValueError(
            f"{url} holds {outside[0]!r}, which would be written outside {folder}: nothing is copied; remove that "
            "object, or take the checkpoint from those who wrote it"
        )
    free = shutil.disk_usage(_nearest(folder)).free
    if free < sum(sizes.values()):
        raise OSError(
            f"{free / 2**20:.0f} MiB are free for {folder}, where {sum(sizes.values()) / 2**20:.0f} MiB of {url} are "
            "copied: free space on that disk"
        )
    done.unlink(missing_ok=True)
    for name, size in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may copy the same
        try:
            with partial.open("wb") as file:
                for start in range(0, size, PIECE):
                    file.write(store.read(name, start, min(start + PIECE, size)))
            flush(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)  # where the store failed, or the user ended it
    write_atomic(done, mark)
    return folder


def _nearest(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
