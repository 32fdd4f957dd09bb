"""May a stranger's .pth be read? It runs no code and takes no more memory or time than its bytes are worth.

A .pth is a zip archive whose pickle may call what builds tensors, and nothing else: `weights_only=True` alone lets it
call `bytearray(10**12)`.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.ranges import LARGEST_HEADER  # for pickles too

MOST_ENTRIES = 100_000  # of an archive
PICKLE = "data.pkl"  # in an archive of torch.save, within its one folder
ARCHIVE = b"PK\x03\x04"  # with which a zip begins, whose table of contents is its end
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
MOST_IN_TUPLE, MOST_NESTED = 2**20, 100  # items and characters of a tuple, and tuples in one another
MARK = object()  # on the stack of a pickle
NOT_READ = "is not read: take the file from its authors again, or another one"


def read_pickle(path: Path) -> Mapping[str, Any]:
    """What an archive of torch.save holds, left on the disk until it is used; ValueError for what is hostile."""
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
            waiting += [(key_of(key), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple | set):
            waiting += [(name, inner) for inner in value]


def key_of(key: Any) -> str:
    """A key of a mapping to tell of; only its kind where it is no name, as some would be gigabytes in words."""
    return key if isinstance(key, str) else f"a key of type {type(key).__name__}"


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


def tuples_in(pickled: bytes) -> Iterator[tuple[int, int]]:
    """Of every tuple that a pickle makes its size, in items and characters, and its depth, in tuples.

    What is shared counts wherever it stands: whoever hashes or prints a tuple walks over it as often.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for code, argument, _ in pickletools.genops(pickled):
        before = [kind.name for kind in code.stack_before]
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            items = []
            if "mark" in before:
                while (top := stack.pop()) is not MARK:
                    items.append(top)
                before = before[: before.index("mark")]
            items += [stack.pop() for _ in before]
            for kind in code.stack_after:
                made: Any = (1 + len(argument) if isinstance(argument, str | bytes) else 1, 0)
                if kind.name == "tuple":
                    made = (
                        min(1 + sum(size for size, _ in items), 2**62),
                        1 + max((deep for _, deep in items), default=0),
                    )
                    yield made
                stack.append(MARK if kind.name == "mark" else made)


def _check_pickle(path: Path, content: bytes) -> None:
    """ValueError for what calls other than CALLED, and for tuples that are larger than any model's."""
    try:
        for code, argument, _ in pickletools.genops(content):
            is_storage = str(argument).startswith("torch ") and str(argument).endswith("Storage")
            if code.name in CALLING or (code.name == "GLOBAL" and not is_storage and argument not in CALLED):
                raise PermissionError(argument or code.name)
        size, depth = (max(found) for found in zip((0, 0), *tuples_in(content), strict=True))
    except PermissionError as error:
        raise ValueError(
            f"{path} would call {str(error)!r} when it is read; a file of weights calls nothing but what builds "
            f"tensors. It {NOT_READ}; where you trust it, save its state_dict() alone"
        ) from error
    except Exception as error:  # pickletools raises whatever it stumbles over
        raise ValueError(f"{path} holds a damaged pickle ({error}): it {NOT_READ}") from error
    if size > MOST_IN_TUPLE or depth > MOST_NESTED:
        raise ValueError(
            f"{path} holds tuples in one another that would be {size:,} items and characters if each stood there as "
            f"often as it is shared, {depth} deep, where at most {MOST_IN_TUPLE:,} and {MOST_NESTED} are allowed: it "
            f"{NOT_READ}"
        )
