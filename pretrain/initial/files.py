"""How are weights opened that a stranger made, so that they run no code and take no more memory than their bytes?

Sizes are judged from headers, before anything is read; of a .pth in pickles.py. Tensors stay in the file until they
are used (mmap).
"""

from __future__ import annotations

import errno
import json
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.checkpoint.ranges import HEADER, LARGEST_HEADER
from pretrain.initial.pickles import NOT_READ, read_pickle
from pretrain.intact import sha256

LARGEST_TEXT = 2**22  # bytes of a config.json or an index of files
MOST_FILES = 512  # that an index may name
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
PIXELS = "preprocessor_config.json"  # of transformers
KEYS = "keys.json"  # of an export of ours: its format, and where every tensor went
SHA256 = "sha256"  # in it: of every file of weights, by name
NAMES = ("model.safetensors", INDEX, "pytorch_model.bin", "internimage.pth")  # in a folder, in this order
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class Weights:
    """Tensors under the file's own names, and what its folder says of the model."""

    tensors: Mapping[str, Any]  # what a pickle holds may also be containers of such mappings, and numbers
    files: tuple[Path, ...]  # that they were read from
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json beside them
    pixels: Mapping[str, Any] = field(default_factory=dict)  # preprocessor_config.json beside them


def open_weights(path: Path) -> Weights:
    """Of a .safetensors or .pth file, or of a folder that holds one.

    What lies beside a file that is named tells of it in an export of ours, whose folder may hold two of them.
    FileNotFoundError when there is none; ValueError for what is damaged, hostile or of another kind.
    """
    if path.is_dir():
        file = weights_in(path)
        config, pixels = _settings(path)
    else:
        file = regular(path)
        config, pixels = _settings(path.parent) if (path.parent / KEYS).is_file() else ({}, {})
    if file.name == INDEX:
        tensors, files = _indexed(path, file)
        return Weights(tensors, files, config, pixels)
    return Weights(read_tensors(file), (file,), config, pixels)


def _settings(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What config.json and preprocessor_config.json of a folder say."""
    config, pixels = (
        read_json(own_file(folder, name)) if (folder / name).exists() else {} for name in (CONFIG, PIXELS)
    )
    return config, pixels


def weights_in(folder: Path) -> Path:
    """The file of weights of a folder; FileNotFoundError or ValueError unless there is one that is meant."""
    for name in NAMES:
        if (folder / name).exists() or (folder / name).is_symlink():
            return own_file(folder, name)
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", *PICKLES))
    if not found:
        if any(path.suffix == ".onnx" for path in folder.iterdir()):
            raise FileNotFoundError(
                f"{folder} holds an export to onnx, whose graph is not read for its weights: name the run's "
                "checkpoint, or its export to another format"
            )
        raise FileNotFoundError(
            f"{folder} holds no weights: there must be one of {', '.join(NAMES)}, or one file of another name that "
            f"ends in .safetensors, {', '.join(PICKLES)}, such as towers.safetensors or backbone.pth of an export"
        )
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} files of weights, {found[:5]}: name one of them")
    return own_file(folder, found[0])


def own_file(folder: Path, name: str) -> Path:
    """A file right in a folder; ValueError for a name or link that leads out of it.

    The links of a Hugging Face cache, from `snapshots/REVISION` to `blobs`, are its own.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{folder} names the file {name!r}, which lies elsewhere: it {NOT_READ}")
    path = regular(folder / name)
    home, target = folder.resolve(), path.resolve()
    homes = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    if target.parent not in homes:
        raise ValueError(
            f"{path} is a link that leads out of the folder, to {target}: copy it into the folder, "
            "or name that file itself"
        )
    return path


def regular(path: Path) -> Path:
    """Itself; FileNotFoundError or ValueError unless it is a file of bytes."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path} is a link that leads back to itself: copy the file again") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is no regular file: name a file of weights, or a folder that holds one")
    return path


def read_tensors(path: Path) -> Mapping[str, Any]:
    """What one file holds, left on the disk until it is used; of an export of ours it is what was written."""
    if path.suffix in PICKLES:
        tensors = read_pickle(path)
    elif path.suffix == ".safetensors" or not path.suffix:  # blobs of a cache have none
        tensors = _read_safetensors(path)
    else:
        raise ValueError(
            f"{path} ends in {path.suffix!r}, which is no file of weights: give .safetensors or one of "
            f"{', '.join(PICKLES)}"
        )
    require_as_exported(path)
    return tensors


def require_as_exported(file: Path) -> None:
    """ValueError for a file of weights whose bytes are others than those that its export has proven.

    Its folder's keys.json tells them; without it, and of exports of before, nothing is compared. A file is read once
    more for it, which takes seconds of one of 4 GB.
    """
    if not (file.parent / KEYS).is_file():
        return
    digests = read_json(own_file(file.parent, KEYS)).get(SHA256, {})
    if not isinstance(digests, Mapping):
        raise ValueError(f"{file.parent / KEYS} has {SHA256} {digests!r}, no digests by file: copy it again")
    if file.name in digests and digest_of(file) != (told := digests[file.name]):
        raise ValueError(
            f"{file} has SHA-256 {digest_of(file)[:12]}, {KEYS} beside it tells {str(told)[:12]}: its bytes are not "
            f"those that were exported; copy the export again, or remove {KEYS} if you changed the weights yourself"
        )


def digest_of(file: Path) -> str:
    """SHA-256 of a file's bytes, which are read once while it stays as it is."""
    found = file.stat()
    return _digest(file.resolve(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=MOST_FILES)
def _digest(file: Path, *state: int) -> str:
    return sha256(file)


def header_length(path: Path, num_bytes: int, first: bytes) -> int:
    """Bytes of a safetensors header, from the first 8 of the file; ValueError when it cannot be so long."""
    if len(first) < 8:
        raise ValueError(f"{path} has {num_bytes} bytes, too few for safetensors: copy it again")
    (length,) = struct.unpack(HEADER, first)
    if not 0 < length <= min(LARGEST_HEADER, num_bytes - 8):
        raise ValueError(
            f"{path}: a header of {length} bytes is said to lie in {num_bytes} bytes, where at most {LARGEST_HEADER} "
            f"are allowed: it is no safetensors file, or damaged, and {NOT_READ}"
        )
    return length


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        header_length(path, path.stat().st_size, file.read(8))
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:  # checks offsets and shapes
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no sound safetensors file ({error}): it {NOT_READ}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; ValueError for anything else, and for more than LARGEST_TEXT."""
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, more than {LARGEST_TEXT:,}: it {NOT_READ}"
        )
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): it {NOT_READ}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is a JSON {type(content).__name__}, no object: it {NOT_READ}")
    return content


def _indexed(folder: Path, index: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """The tensors of a folder whose index says in which file each lies."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has no weight_map of file names: it {NOT_READ}")
    names = sorted(set(places.values()))
    if len(names) > MOST_FILES:
        raise ValueError(f"{index} names {len(names)} files, more than {MOST_FILES}: it {NOT_READ}")
    files = tuple(own_file(folder, name) for name in names)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_safetensors(file)
    if tensors.keys() != places.keys():
        raise ValueError(
            f"{index} and its files differ: {sorted(tensors.keys() ^ places.keys())[:3]}: copy the folder again"
        )
    return tensors, files
