"""Is a hostile archive harmless? Nothing is written, nothing outside is read, no memory is taken for its claims."""

from __future__ import annotations

import io
import resource
import tarfile
from itertools import islice
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.limits import Limits
from data_prep.places import place_of
from data_prep.schema import Manifest
from data_prep.sources.listing import FileRef, files_of
from data_prep.sources.picked import Item, make_picked
from data_prep.sources.tar_index import BadTar, Member, members_of
from tests.data_prep.sources.archive import header, tar_of
from tests.data_prep.sources.conftest import picture

HUGE = 2**60
PICTURE = picture(1)


def _listed(content: bytes) -> list[tuple[str, int, int]]:
    members = islice(members_of(io.BytesIO(content)), 1000)  # of one header there may be no end
    return [(one.name, one.offset, one.num_bytes) for one in members]


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_listed_as_the_standard_library_lists_it(form):
    names = ["a.jpg", "folder/b.jpg", "x" * 90 + "/" + "y" * 60 + ".jpg"]
    names += [] if form == tarfile.USTAR_FORMAT else ["z" * 300 + ".jpg", "ünï/ç.jpg"]
    content = tar_of([(name, bytes([65 + place]) * (700 * place)) for place, name in enumerate(names)], form)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    assert _listed(content) == expected and [name for name, _, _ in expected] == names


HOSTILE = {
    "links to /etc/passwd": header(b"a.jpg", 0, b"2", b"/etc/passwd")
    + header(b"b.jpg", 0, b"1", b"/etc/passwd"),
    "devices and pipes": header(b"a.jpg", 0, b"3") + header(b"b.jpg", 0, b"4") + header(b"c.jpg", 0, b"6"),
    "a folder": header(b"a.jpg/", 0, b"5"),
    "an old folder": header(b"a.jpg/", 0, b"0"),
    "a GNU sparse file": header(b"a.jpg", 512, b"S") + bytes(512),
    "a pax sparse file": header(b"p", 21, b"x")
    + _padded(b"21 GNU.sparse.major=1\n"[:21])
    + header(b"a.jpg", 0),
    "an unknown kind": header(b"a.jpg", 0, b"Z"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_regular_file_is_passed_over(name):
    good = header(b"good.jpg", len(PICTURE)) + _padded(PICTURE)
    (member,) = _listed(HOSTILE[name] + good + bytes(1024))
    assert member[0] == "good.jpg" and member[2] == len(PICTURE)


@pytest.mark.parametrize(
    "content",
    [
        header(b"name", HUGE, b"L"),
        header(b"name", HUGE, b"x"),
        header(b"name", 2**21, b"x") + bytes(2**21),
        header(b"p", 15, b"x") + _padded(b"9999999 path=ab\n"),
        header(b"p", 15, b"x") + _padded(b"no length at all"),
        header(b"p", 12, b"x") + _padded(b"12 size=-99\n") + header(b"a.jpg", 0),
        header(b"p", 28, b"x") + _padded(b"28 size=9223372036854775808\n") + header(b"a.jpg", 0),
        header(b"a.jpg", b"-0000001000\0"),  # 512 bytes back: the same header again
        header(b"a.jpg", b"+0000001000\0"),
        header(b"a.jpg", b"0000_001000\0"),
        header(b"a.jpg", b"\xff" * 12),
        header(b"a.jpg", b"\x80\xff" + b"\xff" * 10),
        header(b"a.jpg", b"not a number"),
        b"x" * 512,
        b"",
        b"\x1f\x8b" + bytes(1000),
    ],
)
def test_headers_that_lie_end_the_list_with_an_error_and_no_memory(content):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadTar):
        _listed(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


WHOLE = tar_of([("cat/a.jpg", picture(1)), ("cat/b.jpg", picture(2)), ("cat/c.jpg", picture(3))])
SECOND = _listed(WHOLE)[1][1] - 512  # where its header begins
DAMAGED = {
    "cut between two members": (WHOLE[:SECOND], 1),
    "cut in a header": (WHOLE[: SECOND + 100], 1),
    "cut in an image": (WHOLE[: SECOND + 600], 2),
    "cut where the end mark begins": (WHOLE[: -(-len(WHOLE.rstrip(b"\0")) // 512) * 512], 3),
    "a header overwritten": (WHOLE[:SECOND] + b"garbage!" * 64 + WHOLE[SECOND + 512 :], 1),
    "a header lost to zeros": (WHOLE[:SECOND] + bytes(512) + WHOLE[SECOND + 512 :], 1),
    "two tars one after the other": (WHOLE + WHOLE, 3),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_tar_without_all_of_itself_is_bad_after_what_it_has(tmp_path, name, capsys):
    content, num_listed = DAMAGED[name]
    listed = []
    with pytest.raises(BadTar):
        for member in members_of(io.BytesIO(content)):
            listed.append(member)
    assert len(listed) == num_listed
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    assert main(["build", "folder", "--from", str(path), "--out", str(tmp_path / "out")]) == 1
    assert "copy a broken one again" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_claim_of_2_to_60_bytes_is_a_truncated_image(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(header(b"a.jpg", HUGE) + PICTURE)
    with open(path, "rb") as file:
        assert next(members_of(file)) == Member("a.jpg", 512, HUGE)
    assert FileRef(str(path), 512, HUGE).read() == PICTURE
    item = Item("k-0", "a.jpg", str(path), 512, HUGE, None, None, None)
    (dropped,) = make_picked(item, source="x", categories=(), captions={}, limits=Limits()).dropped
    assert dropped.reason == "truncated"


def test_a_sparse_giant_on_disk_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        file.write(header(b"a.jpg", 2**40))
        file.truncate(2**40 + 1024)  # takes no space
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["build", "folder", "--from", str(path), "--out", str(tmp_path / "out")]) == 1
    item = Item("k-0", "a.jpg", str(path), 512, 2**40, None, None, None)
    (dropped,) = make_picked(
        item, source="x", categories=(), captions={}, limits=Limits(max_bytes=10**5)
    ).dropped
    assert dropped.reason == "too_large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_names_that_lead_outside_write_nothing_there(tmp_path):
    names = [
        "../../outside.jpg",
        "/etc/outside.jpg",
        "a/../../b.jpg",
        "nul\0byte.jpg",
        "-rf.jpg",
        "$(touch x).jpg",
    ]
    pieces = [header(name.encode(), len(picture(n))) + _padded(picture(n)) for n, name in enumerate(names)]
    (tmp_path / "inside" / "in").mkdir(parents=True)
    path = tmp_path / "inside" / "in" / "x.tar"
    path.write_bytes(b"".join(pieces) + header(b"folder/link.jpg", 0, b"2", b"/etc/passwd") + bytes(1024))
    out = tmp_path / "inside" / "out"
    command = ["build", "folder", "--from", str(path), "--out", str(out), "--workers", "1", "--max-bad", "1"]
    assert main(command) in (0, 1)  # mixed depths may be refused, by a sentence
    found = {str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.suffix == ".jpg"}
    assert not found and not Path("/etc/outside.jpg").exists()


def test_a_tar_in_a_tar_in_a_tar_is_not_unpacked(tmp_path):
    bomb = tar_of([("a.jpg", PICTURE)])
    for _ in range(20):
        bomb = tar_of([("again.tar", bomb)])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "n01440764.tar").write_bytes(bomb)
    command = [
        "imagenet22k",
        "--from",
        str(tmp_path / "x"),
        "--scratch",
        str(tmp_path / "s"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(["build", *command]) == 1
    assert not list(tmp_path.rglob("*.jpg"))


def test_of_two_members_of_one_name_a_folder_source_takes_the_last(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of([("cat/a.jpg", picture(1)), ("cat/a.jpg", picture(2))]))
    assert files_of(place_of(path))["cat/a.jpg"].read() == picture(2)
    out = tmp_path / "out"
    assert main(["build", "folder", "--from", str(path), "--out", str(out), "--workers", "1"]) == 0
    assert Manifest.read(out).num_samples == 1
