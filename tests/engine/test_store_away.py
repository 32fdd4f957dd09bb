"""Does a start whose checkpoints' place fails end so that it is tried again, and a mistake so that it is not?"""

from __future__ import annotations

import errno
import shutil
import socket
import ssl
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock

import pytest

import pretrain.paths
import pretrain.train
from data_prep import places
from pretrain import main
from pretrain.checkpoint import PLACE_RECORD, record_place
from pretrain.data.faults import BadSample, DataAway, DataError, NobodyThere
from pretrain.exits import FAILED, PREEMPTED, Postponed
from pretrain.paths import Paths
from pretrain.resume import COUNTED, reaching, reading
from pretrain.retries import GaveUp
from tests.engine.toy import toy_run

of_boto = pytest.importorskip("botocore.exceptions")  # which s3fs brings

AWAY = GaveUp("s3://bucket/run has failed for 300 seconds")


def known(out: Path, kept: Path | str) -> Paths:
    """Those of a run that an earlier start has begun."""
    out.mkdir(exist_ok=True)
    (out / PLACE_RECORD).write_text(record_place(out, kept))
    return Paths({}, out, out, checkpoints=kept)


@pytest.mark.parametrize(
    "error", [AWAY, TimeoutError("no answer"), OSError(errno.ESTALE, "Stale file handle")]
)
def test_what_has_served_the_run_is_waited_for(tmp_path: Path, error: OSError) -> None:
    rule = r"^s3://bucket/run fails now .* nothing of them is lost; mend the place if it does not recover by itself"
    with pytest.raises(Postponed, match=rule), reaching(known(tmp_path, "s3://bucket/run")):
        raise error


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("s3://bucket/run", PermissionError("no rights")),
        ("s3://bucket/run", FileNotFoundError("The specified bucket does not exist")),
    ],
)
def test_a_mistake_stays_an_error(tmp_path: Path, place: str, error: OSError) -> None:
    known(tmp_path, "s3://bucket/run")
    with pytest.raises(type(error)), reaching(Paths({}, tmp_path, tmp_path, checkpoints=place)):
        raise error


def caused_by(why: Exception) -> OSError:
    """As a store that is asked patiently gives up."""
    error = GaveUp(f"s3://bucket/new has failed for 300 seconds, at last with {why!r}")
    error.__cause__ = why
    return error


def answered(status: int) -> OSError:
    """By S3, as its client tells it."""
    return caused_by(
        of_boto.ClientError({"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {}}, "ListObjectsV2")
    )


@pytest.mark.parametrize(
    ("error", "is_transient"),
    [
        (caused_by(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")), True),
        (AWAY, True),
        (TimeoutError("no answer within 60 seconds"), True),
        (caused_by(socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")), True),
        (answered(503), True),
        (answered(429), True),
        (answered(400), False),
        (answered(301), False),  # the bucket of another region
        (caused_by(socket.gaierror(socket.EAI_NONAME, "Name or service not known")), False),
        (caused_by(ssl.SSLCertVerificationError("self-signed certificate")), False),
        (PermissionError("no rights"), False),
        (FileNotFoundError("The specified bucket does not exist"), False),
    ],
)
def test_a_store_that_never_served_is_waited_for_if_it_may_be_away_and_starts_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, is_transient: bool
) -> None:
    paths = Paths({}, tmp_path, tmp_path, checkpoints="s3://bucket/new")
    for is_counted in (False, True):
        monkeypatch.setenv(COUNTED, "1" if is_counted else "")
        with pytest.raises(OSError) as caught, reaching(paths):
            raise error
        if not is_transient:
            assert caught.value is error
            continue
        assert type(caught.value) is (Postponed if is_counted else OSError)
        told = "mend the address if it is wrong" if is_counted else "nothing counts the starts of this job"
        assert str(error) in str(caught.value) and told in str(caught.value)


def test_what_has_served_this_start_is_waited_for_on_a_new_disk_too(tmp_path: Path) -> None:
    paths = Paths({}, tmp_path, tmp_path, checkpoints="s3://bucket/new")
    with pytest.raises(Postponed, match="where this start has found its"), reaching(paths, is_held=True):
        raise AWAY


@pytest.mark.parametrize(
    ("error", "folder"),
    [
        (DataAway("s3://bucket/set fails"), None),
        (DataAway("s3://bucket/set fails"), Path("step_000003")),
        (NobodyThere("s3://bucket/set refuses"), Path("step_000003")),  # which an earlier start has read
    ],
)
def test_data_that_are_away_are_waited_for(error: DataAway, folder: Path | None) -> None:
    with pytest.raises(Postponed, match=rf"^{error}; a job script .* after 75 .*again$"), reading(folder):
        raise error


@pytest.mark.parametrize(
    ("error", "folder"),
    [
        (NobodyThere("refuses"), None),  # it may be a wrong address
        (DataError("may not be read"), Path("step_000003")),
        (FileNotFoundError("manifest.json is missing"), Path("step_000003")),
        (BadSample("missing_shard", "is missing"), None),
    ],
)
def test_what_no_other_start_mends_in_the_data_stays_an_error(error: Exception, folder: Path | None) -> None:
    with pytest.raises(type(error)) as caught, reading(folder):
        raise error
    assert caught.value is error


def test_a_store_that_fails_while_a_start_claims_it_is_waited_for_unless_it_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places.Place, "names", Mock(side_effect=OSError("503")))
    new = Paths({}, tmp_path / "new", tmp_path, checkpoints="s3://bucket/run")
    old = known(tmp_path / "old", "s3://bucket/run")
    for paths, counted, end in ((new, "", OSError), (old, "", Postponed), (new, "1", Postponed)):
        monkeypatch.setenv(COUNTED, counted)
        with ExitStack() as held, pytest.raises(OSError, match="503") as ended:
            pretrain.train._sole(held, paths)
        assert type(ended.value) is end


def test_a_disk_that_is_not_mounted_is_waited_for_and_not_begun_anew(tmp_path: Path) -> None:
    kept = tmp_path / "disk" / "kept"
    kept.mkdir(parents=True)
    paths = known(tmp_path / "out", kept)
    with ExitStack() as held:
        pretrain.train._sole(held, paths)
    shutil.rmtree(kept.parent)
    with ExitStack() as held, pytest.raises(Postponed, match="no folder is there: mount its disk, or delete"):
        pretrain.train._sole(held, paths)
    assert not kept.parent.exists()


@pytest.mark.parametrize(("error", "code"), [(Postponed("away"), PREEMPTED), (OSError("away"), FAILED)])
def test_what_is_waited_for_ends_with_the_code_that_goes_into_the_queue_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError, code: int
) -> None:
    monkeypatch.setattr(main, "quieten", lambda: None)
    monkeypatch.setattr(pretrain.train, "train", Mock(side_effect=error))
    monkeypatch.setattr(pretrain.paths, "Paths", Mock())
    asked = Mock(out=Path("out"))
    asked.__class__ = Namespace
    assert main.start(toy_run(), asked) == code
    assert capsys.readouterr().err == "\nerror: away\n"
