"""What does a data set behind a URL hold, also while its store fails now and then?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from data_prep.schema import MANIFEST_NAME, Shard
from data_prep.stores import A_URL, OF_RIGHTS, is_absent, status_of
from pretrain.data.faults import BadSample, DataAway, DataError, NobodyThere
from pretrain.retries import GaveUp, is_of_address, patiently, refusal

PATIENCE = 600.0  # seconds that a store may fail, or a full cache stay full, before the run ends
PATIENCE_AT_START = 20.0  # seconds: a wrong address or key is told soon
REFUSED_AT_START = 3.0  # seconds that no store may take questions at an address that never served from here
ATTEMPT = 60.0  # seconds that one request may take, the next one twice as long
T = TypeVar("T")


class Store:
    """A data set behind a URL, which is only read.

    A store that fails is asked again, with growing pauses, for PATIENCE seconds; then DataAway. A set `stopped` ends
    that after an attempt. What the store says is missing raises FileNotFoundError, of a shard BadSample; what it
    forbids DataError.
    """

    def __init__(self, url: str, stopped: threading.Event) -> None:
        self.url, self._stopped = url, stopped
        self._fs: Any = None

    def manifest(self, is_known: bool) -> bytes:
        """The content of manifest.json now; is it a store that served this machine before?

        FileNotFoundError without one, DataAway where the store fails, NobodyThere where it may be a wrong address.
        """
        try:
            return self.content(MANIFEST_NAME, is_known)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.url}/{MANIFEST_NAME} is missing: name the URL of a data set that `python -m data_prep "
                "build` made"
            ) from error

    def files(self, folder: str, is_known: bool) -> list[str]:
        """Names of all files inside a folder, as they stand there; none where there is none. Errors as `manifest`."""

        def find(fs: Any, path: str) -> list[str]:
            fs.ls(path)  # raises, where `find` of some file systems leaves out what fails
            return [name[len(path) + 1 :] for name in fs.find(path)]

        try:
            found = self._at_start(folder, find, is_known)
        except FileNotFoundError:
            return []
        return [name for name in found if name[-1:] not in ("", "/")]  # what marks a folder is no file

    def content(self, name: str, is_known: bool) -> bytes:
        """Of a small file. Errors as `manifest`."""
        return self._at_start(name, lambda fs, path: fs.cat_file(path), is_known)

    def _at_start(self, name: str, work: Callable[[Any, str], T], is_known: bool) -> T:
        """As `_patiently`, of what a start asks first: where no store takes questions it may be a wrong address."""
        begun = time.monotonic()

        def ask(fs: Any, path: str) -> T:
            try:
                return work(fs, path)
            except Exception as error:
                why = _of_address(error)
                is_early = time.monotonic() - begun < (PATIENCE_AT_START if is_known else REFUSED_AT_START)
                if not why or is_early:
                    raise
                raise (DataAway if is_known else NobodyThere)(
                    f"{self.url} cannot be read, {why}: mend the address, of S3 that in AWS_ENDPOINT_URL, or start "
                    "the server, and start again"
                ) from error

        return self._patiently(name, ask, PATIENCE_AT_START)

    def sizes(self) -> dict[str, int | None]:
        """Bytes by name of everything beside the manifest, None where the store does not tell."""
        listed = self._patiently("", lambda fs, path: fs.ls(path, detail=True))
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in listed}

    def require_size(self, shard: Shard) -> None:
        """BadSample where a shard is missing, or has not as many bytes as the manifest says."""
        self._of_shard(shard, lambda fs, path: self._require_size(fs, path, shard))

    def piece(self, shard: Shard, start: int, end: int) -> bytes:
        """Those bytes of a shard; BadSample where it is no more what the manifest says."""

        def read(fs: Any, path: str) -> bytes:
            try:
                content = fs.cat_file(path, start=start, end=end)
                if len(content) < end - start:
                    raise OSError(f"{len(content)} of {end - start} bytes came")
            except Exception:  # a shard that became shorter meanwhile is no failing store
                self._require_size(fs, path, shard)
                raise
            return content

        content = self._of_shard(shard, read)
        if len(content) > end - start:
            raise DataError(f"{self.url} does not serve parts of files: copy the data set to a disk or to S3")
        return content

    def _of_shard(self, shard: Shard, work: Callable[[Any, str], T]) -> T:
        """As `_patiently`, of a shard."""
        try:
            return self._patiently(shard.name, work)
        except FileNotFoundError as error:
            raise BadSample("missing_shard", f"{self.url}/{shard.name} is missing") from error

    def _require_size(self, fs: Any, path: str, shard: Shard) -> None:
        size = fs.info(path)["size"]
        if size is not None and size != shard.num_bytes:
            raise BadSample(
                "truncated_shard",
                f"{self.url}/{shard.name} has {size} bytes, the manifest says {shard.num_bytes}",
            )

    def _connect(self) -> tuple[Any, str]:
        """The file system and the path of the folder there; ValueError when no package knows such a URL."""
        if self._fs is None:
            try:
                self._fs = fsspec.url_to_fs(self.url, use_listings_cache=False)
            except (ValueError, ImportError) as error:
                raise ValueError(f"{self.url} cannot be opened ({error}): {A_URL}") from error
        return self._fs

    def _patiently(self, name: str, work: Callable[[Any, str], T], patience: float | None = None) -> T:
        """What `work`, which only reads, gives for the file system and the path of a file, asked again if need be."""
        fs, root = self._connect()
        told = f"{self.url}/{name}".rstrip("/")
        try:
            return patiently(
                lambda: work(fs, f"{root}/{name}".rstrip("/")),
                told,
                PATIENCE if patience is None else patience,
                attempt=ATTEMPT,
                final=(BadSample, DataError),
                stopped=self._stopped,
            )
        except PermissionError as error:
            raise DataError(f"{told} may not be read: {error}; mend the access and start again") from error
        except GaveUp as error:
            raise DataAway(
                f"{error.strerror}: start again when the store answers, nothing is lost"
            ) from error


def _of_address(error: Exception) -> str:
    """Why it may be a wrong address; "" of errors that say nothing of it."""
    if refused := refusal(error):
        return f"nobody takes connections there ({refused})"
    is_answer = is_absent(error) or status_of(error) in OF_RIGHTS  # by a store
    return f"no store answers there ({error})" if is_of_address(error) and not is_answer else ""
