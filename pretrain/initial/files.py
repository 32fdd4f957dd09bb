"""How are weights opened that a stranger made, so that they run no code and take no more memory than their bytes?

Sizes are judged from headers, before anything is read. A .pth is a zip archive whose pickle may call what builds
tensors, and nothing else: `weights_only=True` alone lets it call `bytearray(10**12)`. Tensors stay in the file until
they are used (mmap).
"""

from __future__ import annotations

import errno
import json
import pickletools
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.checkpoint.ranges import HEADER, LARGEST_HEADER  # for pickles too

LARGEST_TEXT = 2**22  # bytes of a config.json or an index of files
MOST_FILES = 512  # that an index may name
MOST_ENTRIES = 100_000  # of an archive
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
PIXELS = "preprocessor_config.json"  # of transformers
NAMES = ("model.safetensors", INDEX, "pytorch_model.bin", "internimage.pth")  # in a folder, in this order
PICKLE = "data.pkl"  # in an archive of torch.save, within its one folder
ARCHIVE = b"PK\x03\x04"  # with which a zip begins, whose table of contents is its end
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
CALLED = {  # what the pickle of a state dict names
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
}
MOST_SHARED = (
    4  # bytes of all tensors / bytes of the file: tied weights and two names of one mapping are shared
)
CALLING = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}  # other ways to call
NOT_READ = "is not read: take the file from its authors again, or another one"


@dataclass(frozen=True)
class Weights:
    """Tensors under the file's own names, and what its folder says of the model."""

    tensors: Mapping[str, Any]  # what a pickle holds may also be containers of such mappings, and numbers
    files: tuple[Path, ...]  # that they were read from
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json beside them
    pixels: Mapping[str, Any] = field(default_factory=dict)  # preprocessor_config.json beside them


def open_weights(path: Path) -> Weights:
    """Of a .safetensors or .pth file, or of a folder that holds one.

    FileNotFoundError when there is none; ValueError for what is damaged, hostile or of another kind.
    """
    if path.is_dir():
        file = weights_in(path)
        config, pixels = (
            read_json(own_file(path, name)) if (path / name).exists() else {} for name in (CONFIG, PIXELS)
        )
    else:
        file, config, pixels = regular(path), {}, {}
    if file.name == INDEX:
        tensors, files = _indexed(path, file)
        return Weights(tensors, files, config, pixels)
    return Weights(read_tensors(file), (file,), config, pixels)


def weights_in(folder: Path) -> Path:
    """The file of weights of a folder; FileNotFoundError or ValueError unless there is one that is meant."""
    for name in NAMES:
        if (folder / name).exists() or (folder / name).is_symlink():
            return own_file(folder, name)
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", *PICKLES))
    if not found:
        raise FileNotFoundError(f"{folder} holds no weights: there must be one of {', '.join(NAMES)}")
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
    """What one file holds, left on the disk until it is used."""
    if path.suffix in PICKLES:
        return _read_pickle(path)
    if path.suffix == ".safetensors" or not path.suffix:  # blobs of a cache have none
        return _read_safetensors(path)
    raise ValueError(
        f"{path} ends in {path.suffix!r}, which is no file of weights: give .safetensors or one of "
        f"{', '.join(PICKLES)}"
    )


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


def _read_pickle(path: Path) -> Mapping[str, Any]:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            begin = file.read(len(ARCHIVE))
        if begin in (b"", ARCHIVE):
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes and lacks its end: copy it again")
        raise ValueError(
            f"{path} is no archive as torch.save writes since version 1.6, so its sizes are not known before it is "
            "read: where you trust it, load it by torch.load(weights_only=True) and save it again"
        )
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch and pickle raise whatever they stumble over
        raise ValueError(f"{path} is no sound file of weights ({error}): it {NOT_READ}") from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, no tensors by name: save model.state_dict()"
        )
    _check_tensors(path, content)
    return content


def tensors_in(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in containers in one another, once, with the last name on the way to it."""
    waiting, seen = [("", content)], set()
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:  # also of a container that holds itself
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            waiting += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple | set):
            waiting += [(name, inner) for inner in value]


def _check_tensors(path: Path, content: Any) -> None:
    """ValueError for tensors that are larger than their bytes in the file: a stride of 0 repeats one number."""
    total = 0
    for name, tensor in tensors_in(content):
        size, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        total += size
        if size > stored:
            raise ValueError(
                f"{path} holds {name!r} of shape {tuple(tensor.shape)}, {size:,} bytes made of {stored:,} by "
                f"repeating them; a tensor must be as large as what is stored of it. It {NOT_READ}; where you trust "
                "it, save tensor.contiguous() of each"
            )
    if total > MOST_SHARED * path.stat().st_size:
        raise ValueError(
            f"{path} holds tensors of {total:,} bytes in {path.stat().st_size:,}, of which many share the same; at "
            f"most {MOST_SHARED} times the file are allowed. It {NOT_READ}; where you trust it, save "
            "each tensor once"
        )


def _check_archive(path: Path) -> None:
    """ValueError unless an archive is as large inside as outside, and its pickle calls nothing but CALLED."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
            if (
                packed
                or sum(e.file_size for e in entries) > path.stat().st_size
                or len(entries) > MOST_ENTRIES
            ):
                raise ValueError(
                    f"{path} would grow when it is read: {len(packed)} of {len(entries)} entries are compressed, "
                    f"{sum(e.file_size for e in entries):,} bytes in a file of {path.stat().st_size:,}, which "
                    f"torch.save never writes: it {NOT_READ}"
                )
            _check_pickle(path, _pickle_in(path, archive))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error) as error:
        raise ValueError(f"{path} is a damaged archive ({error}): it {NOT_READ}") from error


def _pickle_in(path: Path, archive: zipfile.ZipFile) -> bytes:
    """The one pickle of an archive; ValueError where it is not plain which one torch will read.

    Torch's reader takes data.PKL for data.pkl, and of two tables of contents another than zipfile may.
    """
    names = [entry.orig_filename for entry in archive.infolist()]  # with what follows a zero byte
    folder = names[0].partition("/")[0] if names else ""
    pickles = [name for name in names if name.lower().endswith(".pkl")]
    if (
        pickles != [f"{folder}/{PICKLE}"]
        or len({name.lower() for name in names}) != len(names)
        or not all(name.startswith(f"{folder}/") for name in names)
    ):
        raise ValueError(
            f"{path} holds {len(pickles)} pickles in {len(names)} entries, {pickles[:3]}: one {PICKLE} belongs "
            f"there, beside other entries of its folder whose names differ by more than capitals: it {NOT_READ}"
        )
    if archive.getinfo(pickles[0]).file_size > LARGEST_HEADER:
        raise ValueError(
            f"{path} holds a pickle of {archive.getinfo(pickles[0]).file_size:,} bytes, where at most "
            f"{LARGEST_HEADER:,} are allowed: it {NOT_READ}"
        )
    content, reader = archive.read(pickles[0]), torch._C.PyTorchFileReader(str(path))
    records = {f"{folder}/{name}" for name in reader.get_all_records()}
    if records != set(names) or reader.get_record(PICKLE) != content:
        raise ValueError(
            f"{path} has two tables of contents, one with {len(names)} entries and another with {len(records)}, "
            f"which torch.save never writes: it {NOT_READ}"
        )
    return content


def _check_pickle(path: Path, content: bytes) -> None:
    try:
        for code, argument, _ in pickletools.genops(content):
            is_storage = str(argument).startswith("torch ") and str(argument).endswith("Storage")
            if code.name in CALLING or (code.name == "GLOBAL" and not is_storage and argument not in CALLED):
                raise PermissionError(argument or code.name)
    except PermissionError as error:
        raise ValueError(
            f"{path} would call {str(error)!r} when it is read; a file of weights calls nothing but what builds "
            f"tensors. It {NOT_READ}; where you trust it, save its state_dict() alone"
        ) from error
    except Exception as error:  # pickletools raises whatever it stumbles over
        raise ValueError(f"{path} holds a damaged pickle ({error}): it {NOT_READ}") from error


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
