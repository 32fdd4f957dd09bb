"""Does every command that looks after data sets say within seconds what is wrong with its input, and how to go on?"""

from __future__ import annotations

import io
import json
import shutil
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import stores
from data_prep.__main__ import main
from data_prep.doctor import finished
from data_prep.files import sha256_file
from data_prep.places import place_of
from tests.data_prep.pictures import Item, built, encoded, picture
from tests.data_prep.rclone import BUCKET, Server, rclone_server

COMMANDS = {  # name -> command line with {} where the folder stands, and its exit code
    "check": (["check", "{}", "--workers", "1"], 1),
    "stats": (["stats", "{}", "--workers", "1"], 1),
    "leakage": (["leakage", "{}", "--workers", "1", "--against", "WHOLE"], 1),
    "leakage against": (["leakage", "WHOLE", "--workers", "1", "--against", "{}"], 1),
    "diff": (["diff", "WHOLE", "{}", "--workers", "1"], 2),
    "repair": (["repair", "{}", "--workers", "1", "mirror", "--from", "WHOLE"], 1),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    items = [Item(f"p-{number}", encoded(picture(number, (48, 40))), "a caption") for number in range(6)]
    return built(tmp_path_factory.mktemp("whole") / "set", items)


def _missing(folder: Path, whole: Path) -> None:
    return


def _a_tar(folder: Path, whole: Path) -> None:
    shutil.copy(whole / "000000.tar", folder)


def _empty(folder: Path, whole: Path) -> None:
    folder.mkdir()


def _foreign(folder: Path, whole: Path) -> None:
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        header = tarfile.TarInfo("00000001.jpg")
        header.size = 3
        tar.addfile(header, io.BytesIO(b"abc"))


def _unfinished(folder: Path, whole: Path) -> None:
    (folder / ".build").mkdir(parents=True)
    shutil.copy(whole / "000000.tar", folder)


def _one_split_unfinished(folder: Path, whole: Path) -> None:
    shutil.copytree(whole, folder / "train")
    (folder / "val" / ".build").mkdir(parents=True)


def _damaged_manifest(folder: Path, whole: Path) -> None:
    shutil.copytree(whole, folder)
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-20])


def _deep_manifest(folder: Path, whole: Path) -> None:
    shutil.copytree(whole, folder)
    (folder / "manifest.json").write_text("[" * 10**5)


def _newer_manifest(folder: Path, whole: Path) -> None:
    shutil.copytree(whole, folder)
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))


def _half_copied(folder: Path, whole: Path) -> None:
    shutil.copytree(whole, folder)
    (folder / "000001.tar").unlink()


def _deep_record(folder: Path, whole: Path) -> None:
    """A shard whose first .json no parser of JSON wants to end."""
    shutil.copytree(whole, folder)
    path, manifest = folder / "000001.tar", json.loads((folder / "manifest.json").read_text())
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            content = b"[" * 10**5 if name.endswith(".json") else content
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    manifest["shards"][1] |= {"num_bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _foreign_shard(folder: Path, whole: Path) -> None:
    """A tar of the right size and name that another program wrote."""
    shutil.copytree(whole, folder)
    size = (folder / "000001.tar").stat().st_size
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("../../etc/passwd"))
    (folder / "000001.tar").write_bytes(buffer.getvalue()[:size].ljust(size, b"\0"))


INPUTS = {  # what becomes of the folder -> what every command says
    _missing: "is no folder: name",
    _a_tar: "is a file: name",
    _empty: "name a data set",
    _foreign: "has no manifest.json, which is written last, but 1 tar files (00000.tar, ...): copy the rest",
    _unfinished: "its build has not ended: run the same `data_prep build` again",
    _one_split_unfinished: "its build has not ended: run the same `data_prep build` again",
    _damaged_manifest: "manifest.json is not a manifest:",
    _deep_manifest: "manifest.json is not a manifest: its lists",
    _newer_manifest: "schema=99 of data set 'pictures' must be 1",
    _half_copied: "000001.tar",
    _foreign_shard: "000001.tar",
}
TOLERATED = {  # what a command is for, or does not look at
    ("repair", _half_copied),
    ("repair", _foreign_shard),
    ("diff", _foreign_shard),
    ("diff", _one_split_unfinished),
    ("leakage against", _empty),
    ("leakage against", _foreign),
    ("leakage against", _unfinished),
}


@pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__.strip("_"))
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_fault_and_the_remedy(command, make, whole, tmp_path, capsys):
    folder = tmp_path / "set"
    make(folder, whole)
    line, code = COMMANDS[command]
    found = main([part.replace("WHOLE", str(whole)).replace("{}", str(folder)) for part in line])
    message = capsys.readouterr().err
    if (command, make) in TOLERATED:
        assert found in (0, code)
        assert found == 0 or "name" in message
    else:
        assert found == code
        assert INPUTS[make] in message and "Traceback" not in message


@pytest.mark.parametrize("command", ["check", "stats", "diff"])
def test_a_record_that_is_nested_without_end_is_a_fault_of_its_shard(command, whole, tmp_path, capsys):
    folder = tmp_path / "set"
    _deep_record(folder, whole)
    line, code = COMMANDS[command]
    line = [*line, "--samples"] if command == "diff" else line
    found = main([part.replace("WHOLE", str(whole)).replace("{}", str(folder)) for part in line])
    message = capsys.readouterr().err
    assert found == code and "000001.tar" in message and "recursion" in message


@pytest.fixture(scope="module")
def server(tmp_path_factory, whole) -> Iterator[Server]:
    """A store with keys that holds the data set."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        rclone_server(tmp_path_factory.mktemp("s3"), port) as opened,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in {**opened.environment, "AWS_MAX_ATTEMPTS": "1"}.items():
            patch.setenv(name, value)
        shutil.copytree(whole, opened.folder / "set")
        yield opened


def test_all_commands_work_on_a_store(server, whole, tmp_path, capsys):
    url = f"s3://{BUCKET}/set"
    assert main(["check", url, "--workers", "1"]) == 0
    page, report = tmp_path / "s.html", tmp_path / "s.json"
    assert main(["stats", url, "--workers", "1", "--page", str(page), "--json", str(report)]) == 0
    assert page.read_text().count("<figure>") == 6
    assert main(["leakage", url, "--against", url, "--workers", "1", "--json", str(report)]) == 1
    assert len(json.loads(report.read_text())["exclude"][url]) == 6
    assert main(["diff", url, str(whole), "--samples", "--workers", "1"]) == 0
    assert "6 samples show 6 pictures" in capsys.readouterr().out


def test_a_store_is_mended_from_disk_and_disk_from_a_store(server, whole, tmp_path):
    bad = place_of(f"s3://{BUCKET}/bad")
    for path in sorted(path for path in whole.rglob("*") if path.is_file()):
        bad.write(str(path.relative_to(whole)), path.read_bytes())
    content = bytearray((whole / "000001.tar").read_bytes())
    content[600] ^= 1
    bad.write("000001.tar", bytes(content))
    assert main(["check", f"s3://{BUCKET}/bad", "--workers", "1"]) == 1
    assert main(["repair", f"s3://{BUCKET}/bad", "--workers", "1", "mirror", "--from", str(whole)]) == 0
    assert main(["check", f"s3://{BUCKET}/bad", "--workers", "1"]) == 0
    local = Path(shutil.copytree(whole, tmp_path / "local"))
    (local / "000000.tar").unlink()
    assert main(["repair", str(local), "--workers", "1", "mirror", "--from", f"s3://{BUCKET}/set"]) == 0
    assert (local / "000000.tar").read_bytes() == (whole / "000000.tar").read_bytes()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_store_that_refuses_is_told_at_once(command, server, whole, monkeypatch, capsys):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    line, code = COMMANDS[command]
    command_line = [part.replace("WHOLE", str(whole)).replace("{}", f"s3://{BUCKET}/set") for part in line]
    assert main(command_line) == code
    assert "is refused by the store" in capsys.readouterr().err


def test_a_store_that_does_not_answer_is_told_soon(free_port, monkeypatch, capsys):
    monkeypatch.setattr(finished, "ANSWER", 0.5)
    monkeypatch.setattr(stores, "PATIENCE", 2.0)  # the question that nobody waits for any more ends too
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert main(["check", "s3://bucket/set"]) == 1
    assert "gives no answer for 0.5 seconds: name an endpoint that is up" in capsys.readouterr().err


def test_a_place_of_no_known_kind_is_refused(capsys):
    assert main(["stats", "nothing://bucket/set"]) == 1
    assert "cannot be opened" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--page", "--json"])
def test_a_report_that_has_no_folder_is_refused_before_the_work(option, tmp_path, capsys):
    assert main(["stats", str(tmp_path / "absent"), option, str(tmp_path / "no" / "report")]) == 1
    assert f"there is no folder {tmp_path / 'no'}: make it" in capsys.readouterr().err
