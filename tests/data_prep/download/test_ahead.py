"""Does `ahead` download what a build is about to make, and nothing for those who only look?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.build import Options, build, build_part
from data_prep.download import downloaded
from data_prep.schema import Manifest
from tests.data_prep.download.lists import describe, quick, rows_of
from tests.data_prep.download.misbehaving import serving
from tests.data_prep.sources.built import LOOPBACK, run


def test_ahead_downloads_what_the_builder_is_about_to_make_and_no_more(tmp_path: Path) -> None:
    options = Options(workers=1, vocab_size=64)
    with serving() as server:
        rows = rows_of(tmp_path / "rows", [f"{server.url}/good/{number}" for number in range(16)])

        def visited(name: str, **changed: object) -> list[int]:
            server.visits.clear()
            collection = downloaded(
                rows, tmp_path / "work", quick(raw_shard_size=4, ahead=True), describe,
                name="urls", split="train", settings={},
            )  # fmt: skip
            assert not server.visits
            chosen = replace(options, **changed)
            (build_part if chosen.part else build)(collection, tmp_path / name, chosen)
            assert set(server.visits.values()) == {1}
            return sorted(int(path.rpartition("/")[2]) for path in server.visits)

        assert visited("limited", limit=6) == list(range(6))
        assert visited("parts", part="1/2") == [*range(4), *range(8, 12)]
        assert visited("parts") == [*range(4, 8), *range(12, 16)]
    assert not list((tmp_path / "work" / "runs").iterdir())
    assert Manifest.read(tmp_path / "parts").num_samples == 16


@pytest.mark.parametrize("more", [(), ("--ahead",)])
def test_a_dry_run_downloads_nothing_and_says_what_it_wrote(
    more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as server:
        table = {"URL": [f"{server.url}/good/{number}" for number in range(3)], "TEXT": ["a", "b", "c"]}
        table["NSFW"] = ["UNLIKELY"] * 3
        pq.write_table(pa.table(table), tmp_path / "part.parquet")
        command = ["laion400m", "--from", tmp_path / "part.parquet", "--scratch", tmp_path / "s", *LOOPBACK]
        assert run(*command, "--out", tmp_path / "out", "--dry-run", *more) == 0
        assert not server.visits
    kept = f"lists and indices in {tmp_path / 's'}, which the build goes on from"
    assert capsys.readouterr().out.endswith(f"nothing was written but {kept}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.parquet", "s"]
