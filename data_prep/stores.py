"""How is a store behind a URL asked until it answers, and how is it proved that it holds what was put there?"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

PATIENCE = 300.0  # seconds that a store may fail before it is given up
SILENT = 10.0  # seconds after which it is told that a store fails
FIRST_PAUSE = 0.2  # seconds before an attempt is repeated; doubled each time
LONGEST_PAUSE = 20.0  # seconds
PART = 50 * 2**20  # bytes, of one part of an upload in parts; decides the ETag
NO_KEYS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # of boto: the user gave none
NO_ACCESS = (*NO_KEYS, "CredentialRetrievalError")  # no repetition mends them
NO_NAME = "ParamValidationError"  # of boto: a request that no store can take, nor is it sent to one
NO_ADDRESS = {"ValueError": ("Invalid endpoint",), "EndpointResolutionError": ("not a valid URI",)}  # of boto
SET_KEYS = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
MEND_RIGHTS = (
    "mend the keys (AWS_PROFILE, AWS_ACCESS_KEY_ID, ...) or their rights there (list, read, write, delete)"
)
STATUSES = range(100, 600)  # of HTTP
OF_RIGHTS = (401, 403)  # HTTP statuses by which a store refuses who asks
OF_ABSENCE = (404, 410)  # by which it says that it has no such file
WEB_CLIENT = "aiohttp"  # the package whose errors fsspec's client of the web hides
OF_MOMENT = (TimeoutError, ConnectionError, RuntimeError, MemoryError)  # that it hides too
A_URL = "name a folder or a URL that fsspec knows, such as s3://bucket/folder"
OUR_FAULTS = (TypeError, AttributeError, NameError)  # of this code: repeating does not mend them
CHANCE = random.SystemRandom()  # Python's global generator is for those who have seeded it
_MD5 = re.compile(r"[0-9a-f]{32}")
T = TypeVar("T")


class NotVerified(OSError):
    """What a store holds differs from what was put there."""


def patiently(url: str, work: Callable[[Any, str], T]) -> T:
    """What `work` gives for the file system and the path of a URL, repeated while the store fails.

    Pauses grow between attempts; after PATIENCE seconds OSError. What the store says is missing, there already, or
    forbidden raises FileNotFoundError, FileExistsError or PermissionError at once, a name that no store takes
    ValueError.
    """
    fs = connected(url)
    path = fs._strip_protocol(url)
    begun, pause, is_told = time.monotonic(), FIRST_PAUSE, False
    while True:
        try:
            return work(fs, path)
        except (FileExistsError, *OUR_FAULTS):
            raise
        except PermissionError as error:
            raise PermissionError(f"{url} is refused by the store ({error}): {MEND_RIGHTS}") from error
        except Exception as error:  # every store has errors of its own
            if is_absent(error):
                raise
            if status_of(error) in OF_RIGHTS:
                raise PermissionError(f"{url} is refused by the store ({error}): {MEND_RIGHTS}") from error
            if type(error).__name__ in NO_ACCESS:
                raise PermissionError(f"{url} needs keys ({error}): {SET_KEYS}") from error
            if is_misnamed(error):
                raise misnamed(url, error) from error
            failing = time.monotonic() - begun
            if failing > SILENT and not is_told:
                is_told = True
                print(f"{url} fails: {error!r}; tried again for {PATIENCE:g} seconds in all", file=sys.stderr)
            if failing > PATIENCE:
                raise OSError(
                    f"{url} has failed for {failing:.0f} seconds, at last with {error!r}; a store may fail for "
                    f"{PATIENCE:g} seconds: run the same command again when it answers, what is finished stays"
                ) from error
        time.sleep(CHANCE.uniform(pause / 2, pause))  # many processes must not come back all at once
        pause = min(2 * pause, LONGEST_PAUSE)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came of, as a store's client hides it deep inside."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that a store answered with, as the clients of S3, Google, Azure, Hugging Face and the web tell
    it."""
    for one in causes(error):
        response = getattr(one, "response", None)
        told = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}  # of boto
        names = (
            name for name in ("status", "status_code", "code") if isinstance(getattr(one, name, None), int)
        )
        of_response = getattr(response, "status_code", None)  # of requests and httpx
        status = told.get("HTTPStatusCode", getattr(one, next(names, ""), of_response))
        if status in STATUSES:
            return status
    return None


def is_absent(error: Exception) -> bool:
    """Does the store say that there is no such file? fsspec's client of the web says so of whatever fails."""
    if not isinstance(error, FileNotFoundError):
        return False
    why = error.__cause__
    status = None if why is None else status_of(why)
    if status is not None:
        return status in OF_ABSENCE
    is_of_web = type(why).__module__.partition(".")[0] == WEB_CLIENT
    return not is_of_web and not isinstance(why, OF_MOMENT)


def is_misnamed(error: Exception) -> bool:
    """Does a store's client say that it cannot even ask, as the name or the address is none?"""
    return type(error).__name__ == NO_NAME or is_no_address(error)


def is_no_address(error: Exception) -> bool:
    return any(words in str(error) for words in NO_ADDRESS.get(type(error).__name__, ()))


def misnamed(url: str, error: Exception) -> ValueError:
    """What to tell where `is_misnamed`; NO_NAME has a line for every fault and goes on with a pattern of names."""
    if is_no_address(error):
        return ValueError(f"{url}: {error}: write AWS_ENDPOINT_URL as https://HOST or http://HOST:PORT")
    faults = [line.partition(": Bucket name must match")[0] for line in str(error).splitlines()[1:]]
    return ValueError(
        f"{url} cannot be the name of anything there ({'; '.join(faults) or error}): a bucket's has 3 to 63 small "
        "letters, digits, dots and hyphens, write s3://bucket/folder"
    )


def connected(url: str) -> Any:
    """The fsspec file system of a URL, one a process, store and environment (which says keys and endpoint)."""
    scheme, _, rest = url.partition("://")
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _file_system(f"{scheme}://{rest.partition('/')[0]}", os.getpid(), environment)


@lru_cache(maxsize=16)
def _file_system(store: str, process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    import fsspec

    try:
        return fsspec.url_to_fs(store, use_listings_cache=False, skip_instance_cache=True)[0]
    except (ValueError, ImportError) as error:
        raise ValueError(f"{store} cannot be opened ({error}): {A_URL}") from error


class Pieces(io.RawIOBase):
    """The bytes of a remote file, asked for in pieces, each repeated when it fails."""

    mode = "rb"

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.position = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(0, origin + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        start, end = self.position, min(self.size, self.position + len(buffer))
        if end <= start:
            return 0

        def ask(fs: Any, path: str) -> bytes:
            piece = fs.cat_file(path, start=start, end=end)
            if len(piece) != end - start:
                raise OSError(f"{len(piece)} bytes came where {end - start} were asked for")
            return piece

        buffer[: end - start] = patiently(self.url, ask)
        self.position = end
        return end - start


@dataclass(frozen=True)
class Content:
    """What a file that was put somewhere must turn out to be."""

    num_bytes: int
    parts: Callable[[], Iterator[bytes]]  # its bytes, in parts of PART

    @classmethod
    def of_file(cls, path: Path) -> Content:
        """The content of a local file."""
        return cls(path.stat().st_size, lambda: _parts_of_file(path))

    @classmethod
    def of_bytes(cls, content: bytes) -> Content:
        """The content itself."""
        return cls(len(content), lambda: _parts_of_bytes(content))

    def require(self, fs: Any, path: str, url: str) -> None:
        """NotVerified unless the store has these bytes: by size and ETag, or read again where its ETag is no MD5."""
        info = fs.info(path)
        if info["size"] is not None and info["size"] != self.num_bytes:
            raise NotVerified(f"{url} has {info['size']} bytes where {self.num_bytes} were put")
        if self._is_etag(str(info.get("ETag", "")).strip('"')):
            return
        hashed = hashlib.sha256()
        for start in range(0, self.num_bytes, PART):
            hashed.update(fs.cat_file(path, start=start, end=min(start + PART, self.num_bytes)))
        if hashed.digest() != self._hash(hashlib.sha256()):
            raise NotVerified(f"{url} reads back with other bytes than were put")

    def _is_etag(self, etag: str) -> bool:
        """Whether an ETag is that of this content: its MD5, or the MD5 of those of its parts."""
        if _MD5.fullmatch(etag):
            return etag == self._hash(hashlib.md5(usedforsecurity=False)).hex()
        if "-" not in etag:
            return False
        digests = [hashlib.md5(part, usedforsecurity=False).digest() for part in self.parts()]
        return etag == f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"

    def _hash(self, hashed: Any) -> bytes:
        for part in self.parts():
            hashed.update(part)
        return hashed.digest()


def _parts_of_file(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while part := file.read(PART):
            yield part


def _parts_of_bytes(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), PART):
        yield content[start : start + PART]
