"""May a build write here, is there room, and what did an interrupted one leave behind?"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.claim import WORK_FOLDER
from data_prep.doctor.finished import told_of_manifest
from data_prep.places import TEMPORARY, Place
from data_prep.samples import Collection, json_bytes
from data_prep.schema import MANIFEST_NAME, Manifest, manifest_from_json
from data_prep.settings import difference

NO_SPACE = "no space left in"  # begins what is told of a full disk
FULL = (errno.ENOSPC, errno.EDQUOT)
SETTINGS_NAME = f"{WORK_FOLDER}/settings.json"


def read_manifest(place: Place) -> Manifest:
    """The manifest of a data set on disk or behind a URL; its shards must be there with the recorded sizes.

    Raises FileNotFoundError (no manifest or shard) and ValueError (anything that contradicts the schema).
    """
    if place.local is not None:
        return Manifest.read(place.local)
    try:
        manifest = manifest_from_json(place.read(MANIFEST_NAME))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{place}/{MANIFEST_NAME} is missing (it is written last): run the same `data_prep build` again"
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(told_of_manifest(place, error, "build the data set again")) from error
    listed = place.listed()
    for shard in manifest.shards:
        if shard.name not in listed:
            raise FileNotFoundError(
                f"{place}/{shard.name} is missing, the manifest names it: copy it again or build the data set again"
            )
        if listed[shard.name].size != shard.num_bytes:
            raise ValueError(
                f"{place}/{shard.name} has {listed[shard.name].size} bytes, the manifest says {shard.num_bytes}: "
                "copy or build it again"
            )
    return manifest


def is_complete(place: Place, settings: Mapping[str, Any]) -> bool:
    """Whether the place holds this very data set; ValueError when it holds another."""
    if not place.exists(MANIFEST_NAME):
        return False
    _require_same(place, settings, dict(read_manifest(place).builder))
    place.remove_folder(WORK_FOLDER)  # what a builder that was killed at its very end left
    return True


def begin(place: Place, settings: Mapping[str, Any]) -> None:
    """Make the place ours by writing the settings down, or say why it cannot be."""
    if not place.exists(SETTINGS_NAME):
        for above in (place.local, *place.local.parents) if place.local is not None else ():
            if above.exists() and not above.is_dir():
                what = "a file" if above.is_file() else "no folder"
                raise NotADirectoryError(
                    f"{above} is {what}, a build needs an empty folder: choose another --out"
                )
        foreign = sorted({*place.names(), *place.folders()} - {WORK_FOLDER})
        if foreign:
            raise FileExistsError(
                f"{place} holds {foreign[:3]}{' and more' if len(foreign) > 3 else ''}, a build needs an empty "
                "folder: choose another --out, or empty it"
            )
        with explained(place, place), _writable(place):
            place.create(SETTINGS_NAME, json_bytes(settings))
    try:
        begun = json.loads(place.read(SETTINGS_NAME))
    except FileNotFoundError:
        if not place.exists(MANIFEST_NAME):
            raise
        return  # another builder finished since: whoever claims the place next sees that
    _require_same(place, settings, begun)  # also when another builder was here first: two at once must agree


def clean(place: Place, folder: Path) -> None:
    """Remove what killed builders left unfinished: whoever has the claim of the whole may."""
    remove_work(folder)
    if place.local is None:
        return
    for above in (place.local, place.local / WORK_FOLDER):
        for leftover in [*above.glob(f"*{TEMPORARY}"), *above.glob("work-*")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def remove_work(folder: Path) -> None:
    """Remove the folder where a builder made its shards, and the one above it when no other is at work there."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty, or never made
        folder.parent.rmdir()


def require_space(
    collection: Collection, place: Place, folder: Path, num_todo: int, num_at_once: int, shard_size: int
) -> None:
    """OSError when the output's disk cannot hold what is to come, or that of `folder` the shards in the making."""
    num_bytes = collection.num_bytes / max(1, len(collection.items))  # an item
    if place.local is not None:
        _require_free(place.local, int(num_bytes * num_todo), f"{num_todo} items need")
    folder.mkdir(parents=True, exist_ok=True)
    making = int(num_bytes * min(num_todo, num_at_once * shard_size))
    _require_free(folder, making, f"{num_at_once} shards in the making need")


def _require_free(folder: Path, needed: int, told: str) -> None:
    free = free_bytes(folder)
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free / 2**20:,.0f} MiB free, {told} about {needed / 2**20:,.0f} MiB:"
            " free some space or choose another --out or --work",
        )


@contextmanager
def explained(place: Place, folder: Path | Place) -> Iterator[None]:
    """Turn a full disk into a sentence that names it; finished shards stay and are used by the next run."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or str(error.strerror).startswith(NO_SPACE):  # whoever knows has told it
            raise
        where = str(place)
        if place.local is None or free_bytes(Path(str(folder))) < free_bytes(place.local):
            where = f"{folder}, where shards for {place} are made"
        raise OSError(
            error.errno,
            f"{NO_SPACE} {where}: free some space and run the same command again, it goes on after the last"
            " finished shard",
        ) from error


@contextmanager
def _writable(place: Place) -> Iterator[None]:
    """Turn what the system says of a folder on disk that takes no file into a sentence that names it."""
    try:
        yield
    except OSError as error:
        if place.local is None or error.errno in FULL:
            raise
        raise OSError(
            error.errno,
            f"{place} cannot be made or written ({error.strerror}): mend the owner or mount of that folder, or "
            "choose another --out",
        ) from error


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder, or of the one that it will be made in."""
    there = next(above for above in (folder, *folder.absolute().parents) if above.is_dir())
    return shutil.disk_usage(there).free


def _require_same(place: Place, wanted: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    if differing := difference(there, wanted):
        raise ValueError(
            f"{place} was begun with other settings or another input ({differing}); a folder holds one data set:"
            " choose another --out, or remove that folder"
        )
