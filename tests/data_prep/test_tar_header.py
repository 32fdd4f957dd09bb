"""Is the header of a tar member what tarfile writes?"""

from __future__ import annotations

import tarfile

import pytest

from data_prep.tar_header import tar_header


@pytest.mark.parametrize(
    "name", ["a.jpg", "folder-00000007.mask.png", "k" * 96 + ".txt", f"{'d' * 60}/{'k' * 60}.jpg"]
)
@pytest.mark.parametrize("num_bytes", [0, 1, 511, 43_770, 8**11 - 1])
def test_a_header_is_that_of_tarfile(name: str, num_bytes: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    assert tar_header(name, num_bytes) == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_name_that_no_header_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="name is too long"):
        tar_header("k" * 101, 1)
