"""Is an image in an archive left out for what it holds alone, and never because a disk or a store fails?"""

from __future__ import annotations

import errno
from functools import partial

import fsspec
import pytest

from data_prep import stores
from data_prep.limits import Limits
from data_prep.sources.listing import FileRef
from data_prep.sources.picked import Item, make_picked

LIMITS = Limits()
make = partial(make_picked, source="x", categories=(), captions={}, limits=LIMITS)


@pytest.mark.parametrize("archive", ["memory://gone/x.tar", "gone/x.tar"])
def test_an_archive_that_is_gone_is_an_error_and_no_lost_image(archive, tmp_path):
    archive = archive if "://" in archive else str(tmp_path / archive)
    with pytest.raises(OSError, match=r"x.tar cannot be read .*run the same command again"):
        make(Item("k-0", "a.jpg", archive, 512, 99, None, None, None))


def test_a_disk_that_fails_is_an_error_and_no_lost_image(tmp_path, monkeypatch):
    def failing(*arguments):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(FileRef, "read", failing)
    with pytest.raises(OSError, match=r"x.tar cannot be read .*Stale.*run the same command again") as caught:
        make(Item("k-0", "a.jpg", str(tmp_path / "x.tar"), 512, 99, None, None, None))
    assert caught.value.errno == errno.ESTALE


def test_a_piece_behind_the_end_of_a_remote_archive_is_empty_and_a_silent_store_an_error(monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE", 0.1)
    fsspec.filesystem("memory").pipe_file("/cut/x.tar", bytes(512))

    def refusing(*arguments, **options):
        raise OSError(errno.EINVAL, "The requested range is not satisfiable")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", refusing)
    assert FileRef("memory://cut/x.tar", 512, 99).read() == b""
    (dropped,) = make(Item("k-0", "a.jpg", "memory://cut/x.tar", 512, 99, None, None, None)).dropped
    assert dropped.reason == "truncated"
    with pytest.raises(OSError, match=r"x.tar has failed for .*run the same command again"):
        FileRef("memory://cut/x.tar", 0, 99).read()
