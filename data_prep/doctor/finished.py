"""Which finished data sets lie at a place, and what do their manifests and indices say?"""

from __future__ import annotations

import sys
import threading
from array import array
from itertools import pairwise

from data_prep.claim import WORK_FOLDER
from data_prep.files import kind_of
from data_prep.index import index_path
from data_prep.places import Place, place_of
from data_prep.schema import MANIFEST_NAME, TAR_BLOCK, Manifest, manifest_from_json

ANSWER = 20.0  # seconds that a store may take for the first answer


class BadDataSet(Exception):
    """What is wrong with a data set: shard, member, rule and remedy in one sentence."""


def reached(text: str) -> Place:
    """The place that a command names, asked once whether it answers.

    OSError after ANSWER seconds without an answer: a store that fails later in a long run is waited for longer.
    """
    place = place_of(text)
    if place.local is not None:
        return place
    failed: list[Exception] = []

    def ask() -> None:
        try:
            place.exists(MANIFEST_NAME)
        except Exception as error:  # whatever it is, it is raised below
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER)
    if asking.is_alive():
        raise OSError(
            f"{place} gives no answer for {ANSWER:g} seconds: name an endpoint that is up (AWS_ENDPOINT_URL,"
            " AWS_PROFILE), and try the same with another S3 program"
        )
    if failed:
        raise failed[0]
    return place


def data_sets(place: Place) -> list[Place]:
    """`place` itself when it is a data set, else the data sets right below it.

    Raises FileNotFoundError or NotADirectoryError for neither, also when a folder below is not finished.
    """
    if place.exists(MANIFEST_NAME):
        return [place]
    _require_folder(place)
    below, others = _below(place)
    for child in [place, *others]:
        if problem := _unfinished(child):
            raise FileNotFoundError(problem)
    if not below:
        raise FileNotFoundError(
            f"{place} holds no {MANIFEST_NAME}, nor does a folder right below: run the same `data_prep build` again"
            " (it is written last), or name a data set, or the folder above its splits"
        )
    return below


def _require_folder(place: Place) -> None:
    if place.local is not None and not place.local.is_dir():
        kind = "is a file" if place.local.exists() else "is no folder"
        raise NotADirectoryError(f"{place} {kind}: name a data set, or the folder above its splits")


def _below(place: Place) -> tuple[list[Place], list[Place]]:
    """The data sets right below a place, and the other folders there."""
    children = [place.child(name) for name in place.folders() if name != WORK_FOLDER]
    below = [child for child in children if child.exists(MANIFEST_NAME)]
    return below, [child for child in children if child not in below]


def _unfinished(place: Place) -> str:
    """Why a place without a manifest is no data set though it looks like one; "" when it does not."""
    missing = f"{place} has no {MANIFEST_NAME}, which is written last"
    if WORK_FOLDER in place.folders():
        return f"{missing}, its build has not ended: run the same `data_prep build` again"
    if tars := place.names("*.tar"):
        return (
            f"{missing}, but {len(tars)} tar files ({tars[0]}, ...): copy the rest of the data set when it is a copy,"
            " or build one from these files with `python -m data_prep build`"
        )
    return ""


def manifest_at(place: Place) -> Manifest:
    """The manifest of the data set at a place, validated in itself; the shards are not looked at."""
    try:
        content = place.read(MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError) as error:
        _require_folder(place)
        names = [child.name for child in _below(place)[0]]
        hint = f"name one of the data sets below it: {names}" if names else "name a data set"
        raise FileNotFoundError(_unfinished(place) or f"{place} has no {MANIFEST_NAME}: {hint}") from error
    try:
        return manifest_from_json(content)
    except (ValueError, TypeError) as error:
        raise BadDataSet(
            told_of_manifest(place, error, "copy it again, or build the data set again")
        ) from error


def told_of_manifest(place: Place, error: Exception, remedy: str) -> str:
    """What is said of a manifest that cannot be read; `remedy` where the error has none of its own."""
    has_remedy = any(words in str(error) for words in ("build it again", "build the data set again"))
    return f"{place}/{MANIFEST_NAME} is not a manifest: {error}" + ("" if has_remedy else f"; {remedy}")


def require_shards(place: Place, manifest: Manifest) -> None:
    """BadDataSet when shards of the manifest are not at the place, or have another size."""
    listed = place.listed()
    missing = [
        shard.name
        for shard in manifest.shards
        if shard.name not in listed or listed[shard.name].size != shard.num_bytes
    ]
    if missing:
        raise BadDataSet(
            f"{place}: {len(missing)} of {len(manifest.shards)} shards are missing or cut ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}), the manifest names them: copy them again, or run"
            f" `python -m data_prep repair {place}`"
        )


def require_file(place: Place, name: str) -> None:
    """BadDataSet for what is there and no file, such as a pipe, which whoever opens it would wait for."""
    path = None if place.local is None else place.local / name
    if path is not None and path.exists() and not path.is_file():
        kind = kind_of(path.stat().st_mode).removeprefix("a ")
        raise BadDataSet(f"{name} is a {kind} where a file must be: remove that {kind} first")


def index_at(place: Place, shard: str) -> array:
    """The n + 1 byte offsets of a shard: sample i lies in [offsets[i], offsets[i + 1]); BadDataSet without them."""
    name = index_path(shard).name
    require_file(place, name)
    try:
        content = place.read(name)
    except FileNotFoundError as error:
        raise BadDataSet(f"{name} is missing, every shard has one") from error
    if len(content) % 8 or len(content) < 16:
        raise BadDataSet(f"{name} holds {len(content)} bytes, it must be 8 per sample and 8 more")
    offsets = array("Q", content)
    if sys.byteorder == "big":
        offsets.byteswap()
    if offsets[0] or any(at % TAR_BLOCK for at in offsets) or any(a >= b for a, b in pairwise(offsets)):
        raise BadDataSet(f"{name}: offsets must start at 0 and rise in multiples of {TAR_BLOCK}")
    return offsets


def starts_of(manifest: Manifest) -> list[int]:
    """The number, in the data set, of the first sample of every shard, and that of all samples at the end."""
    starts = [0]
    for shard in manifest.shards:
        starts.append(starts[-1] + shard.num_samples)
    return starts
