"""Does a list come out clean, shuffled and complete, and is every input row accounted for?"""

from __future__ import annotations

import bz2
import gzip
import json
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.rows import Input, Normalise, Rows, expanded, normalised, read_rows
from data_prep.rows.comma import read_csv
from data_prep.rows.inputs import fetched
from data_prep.rows.judge import judge
from data_prep.rows.lines import read_lines
from tests.data_prep.rows.malformed import LINES

FAST = Normalise(metadata_threads=1, metadata_memory="1GiB")


def _query(columns: tuple[str, ...]) -> str:
    similarity = "TRY_CAST(similarity AS DOUBLE)" if "similarity" in columns else "NULL::DOUBLE"
    return (
        f"SELECT row, url, caption, {similarity} AS similarity, NULL::VARCHAR AS sha256, NULL::VARCHAR AS md5,"
        " NULL::VARCHAR AS extra, NULL::VARCHAR AS refused FROM {input}"
    )


def _table(path: Path, lines: list[bytes]) -> Input:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return Input(str(path), ("url", "caption"), partial(read_lines, num_columns=2))


def _scored(path: Path, rows: list[tuple[str, str, float | None]]) -> Input:
    urls, captions, similarity = zip(*rows, strict=True)
    pq.write_table(
        pa.table({"url": urls, "caption": captions, "similarity": pa.array(similarity, pa.float64())}), path
    )
    return Input(str(path))


def _made(folder: Path, inputs: list[Input], options: Normalise = FAST, **more) -> Rows:
    return normalised(folder, inputs, _query, options, {}, prefix="t", **more)


def _rows(rows: Rows) -> list[dict]:
    return [row for part in rows.parts for row in pq.read_table(rows.folder / part.name).to_pylist()]


def _rejects(rows: Rows) -> list[dict]:
    return pq.read_table(rows.folder / "rejects.parquet").to_pylist()


def test_every_malformed_line_has_its_verdict(tmp_path):
    padding = [b"http://b.example.com/%d.jpg\tgood" % number for number in range(len(LINES))]
    table = _table(tmp_path / "list.tsv", [line for line, _ in LINES] + padding)
    rows = _made(tmp_path / "rows", [table])
    refused = {reject["row"]: reject["reason"] for reject in _rejects(rows)}
    kept = {(row["url"], row["caption"]) for row in _rows(rows)}
    for number, (line, verdict) in enumerate(LINES, start=1):
        if isinstance(verdict, str):
            assert refused.pop(number, None) == verdict, line[:100]
        else:
            assert number not in refused and verdict in kept, line[:100]
    assert not refused and len(kept) == rows.num_rows
    assert rows.num_repaired == 4


def test_counts_by_reason_and_rows_add_up_to_the_input(tmp_path):
    lines = [line for line, _ in LINES] + [b"http://b.example.com/%d\tx" % (n % 70) for n in range(100)]
    rows = _made(tmp_path / "rows", [_table(tmp_path / "list.tsv", lines)])
    assert rows.num_rows + sum(rows.rejects.values()) == rows.num_inputs == len(lines)
    assert Counter(reject["reason"] for reject in _rejects(rows)) == rows.rejects
    assert rows.num_rows == len(_rows(rows))


def test_the_duplicate_of_highest_similarity_stays_then_the_first(tmp_path):
    url = "http://a.example.com/{}.jpg".format
    first = _scored(
        tmp_path / "a.parquet", [(url(1), "low", 0.2), (url(2), "first", 0.3), (url(3), "none", None)]
    )
    second = _scored(
        tmp_path / "b.parquet",
        [
            (url(1), "high", 0.4),
            (url(2), "second", 0.3),
            (url(3), "some", 0.1),
            (url(1), "nan", float("nan")),
        ],
    )
    rows = _made(tmp_path / "rows", [first, second])
    assert {row["url"]: row["caption"] for row in _rows(rows)} == {
        url(1): "high",
        url(2): "first",
        url(3): "some",
    }
    assert rows.rejects == {"duplicate_url": 4}


def test_the_order_depends_on_the_seed_and_not_on_files_threads_or_parts(tmp_path):
    scored = [(f"http://a.example.com/{number}", f"c{number}", None) for number in range(3000)]
    one = [_scored(tmp_path / "one.parquet", scored)]
    two = [_scored(tmp_path / "x.parquet", scored[1700:]), _scored(tmp_path / "y.parquet", scored[:1700])]
    whole = _rows(_made(tmp_path / "1", one))
    parted = _made(
        tmp_path / "2", two, Normalise(rows_per_part=1000, metadata_threads=2, metadata_memory="1GiB")
    )
    other = _rows(_made(tmp_path / "3", one, Normalise(seed=1, metadata_threads=1, metadata_memory="1GiB")))
    assert _rows(parted) == whole != other
    assert [part.num_rows for part in parted.parts] == [1000, 1000, 1000]
    assert [row["key"] for row in whole[:2]] == ["t-000000000", "t-000000001"]
    assert [row["url"] for row in whole] != sorted(row["url"] for row in whole)
    assert sorted(row["url"] for row in other) == sorted(row["url"] for row in whole)


def test_block_lists_of_addresses_and_hashes_are_obeyed_in_any_spelling(tmp_path):
    digest = "ab" * 32
    hashes = pa.table(
        {
            "url": [f"http://a.example.com/{n}" for n in range(4)],
            "hash": [digest.upper(), None, "x", "cd" * 32],
        }
    )
    pq.write_table(hashes, tmp_path / "list.parquet")
    (tmp_path / "urls.txt").write_text("# removed\r\nHTTP://A.example.com:80/1\r\n\n")
    (tmp_path / "hashes.txt").write_text(f"{digest}\n")
    options = Normalise(
        block_urls=(str(tmp_path / "urls.txt"),),
        block_hashes=(str(tmp_path / "hashes.txt"),),
        metadata_threads=1,
    )
    query = (
        "SELECT row, url, 'c' AS caption, NULL::DOUBLE AS similarity, hash AS sha256, NULL::VARCHAR AS md5,"
        " NULL::VARCHAR AS extra, NULL::VARCHAR AS refused FROM {input}"
    )
    rows = normalised(
        tmp_path / "rows",
        [Input(str(tmp_path / "list.parquet"))],
        lambda columns: query,
        options,
        {},
        prefix="t",
    )
    assert rows.rejects == {"blocked_hash": 1, "blocked_url": 1}
    assert {row["url"][-1]: row["sha256"] for row in _rows(rows)} == {"2": None, "3": "cd" * 32}
    (tmp_path / "hashes.txt").write_text("no hash\n")
    with pytest.raises(ValueError, match="hexadecimal"):
        normalised(
            tmp_path / "other",
            [Input(str(tmp_path / "list.parquet"))],
            lambda columns: query,
            options,
            {},
            prefix="t",
        )


@pytest.mark.parametrize(
    ("option", "line", "rule"),
    [
        ("block_urls", "http://a.example.com/1\tabuse", "no tab"),
        ("block_urls", "a.example.com/1", "url_scheme"),
        ("block_urls", '"http://a.example.com/1"', "url_scheme"),
        ("block_urls", "http://a.example.com/" + "x" * 2**20, "line_too_long"),
        ("block_hashes", "ab" * 32 + "\t1", "no tab"),
        ("block_hashes", "ab" * 31, "64 \\(sha256\\)"),
    ],
)
def test_an_entry_of_a_block_list_that_cannot_be_read_stops_the_run(tmp_path, option, line, rule):
    inputs = [_scored(tmp_path / "list.parquet", [("http://a.example.com/1", "c", None)])]
    path = tmp_path / "blocked.txt"
    path.write_text(f"# a comment\twith a tab\n\n{line}\n")
    with pytest.raises(ValueError, match=f"blocked.txt, line 3: .* cannot be blocked, .*{rule}"):
        _made(tmp_path / "rows", inputs, Normalise(**{option: (str(path),)}))
    assert not (tmp_path / "rows" / "rows.json").exists()


def test_a_parquet_file_is_no_block_list(tmp_path):
    inputs = [_scored(tmp_path / "list.parquet", [("http://a.example.com/1", "c", None)])]
    _scored(tmp_path / "blocked.parquet", [("http://a.example.com/1", "c", None)])
    with pytest.raises(ValueError, match=r"blocked.parquet is a parquet file, .* export it"):
        _made(tmp_path / "rows", inputs, Normalise(block_urls=(str(tmp_path / "blocked.parquet"),)))


def test_packed_tables_read_as_plain_ones(tmp_path):
    lines = b"http://a.example.com/1\tone\nhttp://a.example.com/2\ttwo"
    for name, content in [("a.tsv", lines), ("b.tsv", gzip.compress(lines)), ("c.tsv", bz2.compress(lines))]:
        (tmp_path / name).write_bytes(content)
        rows = [row for block in read_lines(tmp_path / name, 2) for row in block.rows]
        assert rows == [["http://a.example.com/1", "one"], ["http://a.example.com/2", "two"]]
    (tmp_path / "cut.tsv").write_bytes(bz2.compress(lines)[:-9])
    with pytest.raises(ValueError, match="copy it again"):
        list(read_lines(tmp_path / "cut.tsv", 2))
    (tmp_path / "wide.tsv").write_bytes(lines.decode().encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-16"):
        list(read_lines(tmp_path / "wide.tsv", 2))


def test_quoted_cells_may_hold_commas_and_newlines_and_an_endless_quote_is_an_error(tmp_path):
    path = tmp_path / "images.csv"
    path.write_text('id,title,url\n1,"a, ""b""\nc",u1\n2,t\n\n3,t,u3\n')
    (block,) = read_csv(path, ("url", "title"))
    assert block.rows == [["u1", 'a, "b"\nc'], ["u3", "t"]] and block.numbers == [2, 6]
    assert block.rejects == [(4, "columns", "2,t"), (5, "empty_line", "")]
    with pytest.raises(ValueError, match="lack \\['md5'\\]"):
        list(read_csv(path, ("url", "md5")))
    path.write_text('id,title,url\n1,"never ends,u1\n2,t,u\n')
    with pytest.raises(ValueError, match="a quote must end"):
        list(read_csv(path, ("url",)))


def test_an_interrupted_list_continues_with_the_next_input(tmp_path, monkeypatch):
    inputs = [
        _scored(
            tmp_path / f"{name}.parquet", [(f"http://a.example.com/{name}{n}", "c", None) for n in range(50)]
        )
        for name in "xyz"
    ]
    judged: list[int] = []

    def stopping(connection, query, number, target, rules):
        if number == 2 and judged.count(2) == 0:
            judged.append(number)
            raise KeyboardInterrupt
        judged.append(number)
        judge(connection, query, number, target, rules)

    monkeypatch.setattr("data_prep.rows.normalise.judge", stopping)
    with pytest.raises(KeyboardInterrupt):
        _made(tmp_path / "rows", inputs)
    with pytest.raises(FileNotFoundError, match="written last"):
        read_rows(tmp_path / "rows")
    rows = _made(tmp_path / "rows", inputs)
    assert sorted(judged[:3]) == [0, 1, 2] and judged[3:] == [2] and rows.num_rows == 150
    assert _rows(rows) == _rows(_made(tmp_path / "straight", inputs))
    assert _made(tmp_path / "rows", inputs) == rows == read_rows(tmp_path / "rows")
    assert sorted(judged[4:]) == [0, 1, 2]  # of `straight` alone


def test_rows_of_one_address_in_different_batches_are_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.rows.parts.ROW_GROUP", 2048)  # DuckDB's smallest batch
    scored = [(f"http://a.example.com/{n % 2}", f"caption {n}", n / 5000) for n in range(5000)]
    rows = _made(tmp_path / "rows", [_scored(tmp_path / "x.parquet", scored)])
    assert rows.num_rows == 2 and rows.rejects == {"duplicate_url": 4998}
    assert {row["caption"] for row in _rows(rows)} == {"caption 4998", "caption 4999"}  # the most similar


def test_other_settings_another_input_and_changed_parts_are_refused(tmp_path):
    rows = [(f"http://a.example.com/{n}", "c", None) for n in range(50)]
    inputs = [_scored(tmp_path / "list.parquet", rows)]
    made = _made(tmp_path / "rows", inputs)
    with pytest.raises(ValueError, match="other settings or inputs \\(seed: 0 there, 5 asked\\)"):
        _made(tmp_path / "rows", inputs, Normalise(seed=5))
    _scored(tmp_path / "list.parquet", rows[1:])
    with pytest.raises(ValueError, match="\\(inputs\\."):
        _made(tmp_path / "rows", inputs)
    part = tmp_path / "rows" / made.parts[0].name
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="sha256 differs"):
        read_rows(tmp_path / "rows")
    part.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        read_rows(tmp_path / "rows")


def test_a_table_with_other_columns_fails_loudly(tmp_path):
    swapped = _table(
        tmp_path / "list.tsv", [b"caption %d\thttp://a.example.com/%d" % (n, n) for n in range(20)]
    )
    with pytest.raises(ValueError, match=r"20 of 20 rows of list.tsv have no address .* 'caption"):
        _made(tmp_path / "rows", [swapped])
    assert not (tmp_path / "rows" / "rows.json").exists()


def test_inputs_behind_urls_are_copied_and_named_by_pattern(tmp_path):
    store = fsspec.filesystem("memory")
    for name in "ab":
        _scored(tmp_path / "x.parquet", [(f"http://a.example.com/{name}", "c", None)])
        store.pipe_file(f"/lists/{name}.parquet", (tmp_path / "x.parquet").read_bytes())
    store.pipe_file("/lists/notes.txt", b"")
    paths = expanded(["memory://lists"], "parts")
    assert (
        paths
        == expanded(["memory://lists/*.parquet"], "parts")
        == ("memory://lists/a.parquet", "memory://lists/b.parquet")
    )
    rows = _made(tmp_path / "rows", [Input(path) for path in paths])
    assert sorted(row["url"][-1] for row in _rows(rows)) == ["a", "b"]
    for name in ("/lists/en/1/c.parquet", "/lists/.hidden/d.parquet"):
        store.pipe_file(name, (tmp_path / "x.parquet").read_bytes())
    assert expanded(["memory://lists"], "parts") == (*paths, "memory://lists/en/1/c.parquet")
    (tmp_path / "lists" / "en").mkdir(parents=True)
    (tmp_path / "x.parquet").rename(tmp_path / "lists" / "en" / "x.parquet")
    assert expanded([str(tmp_path / "lists")], "parts") == (str(tmp_path / "lists" / "en" / "x.parquet"),)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist, or matches no file"):
        expanded([str(tmp_path / "nowhere")], "parts")


def test_a_finished_list_copies_and_hashes_an_input_only_when_its_size_or_time_differ(tmp_path, monkeypatch):
    scored = [("http://a.example.com/1", "c", None)]
    local = _scored(tmp_path / "x.parquet", scored)
    _scored(tmp_path / "y.parquet", [("http://a.example.com/2", "c", None)])
    store = fsspec.filesystem("memory")
    store.pipe_file("/stamped/y.parquet", (tmp_path / "y.parquet").read_bytes())
    inputs = [local, Input("memory://stamped/y.parquet")]
    rows = _made(tmp_path / "rows", inputs)
    read: list[str] = []
    monkeypatch.setattr(
        "data_prep.rows.normalise.fetched", lambda path, work: read.append(path) or fetched(path, work)
    )
    assert _made(tmp_path / "rows", inputs) == rows and not read
    with pytest.raises(ValueError, match="\\(seed: 0 there, 5 asked\\)"):
        _made(tmp_path / "rows", inputs, Normalise(seed=5))
    assert not read
    os.utime(tmp_path / "x.parquet", ns=(1, 1))  # the same content
    again = _made(tmp_path / "rows", inputs)
    assert again.settings == rows.settings and len(read) == 2
    assert _made(tmp_path / "rows", inputs) == again and len(read) == 2
    store.pipe_file("/stamped/y.parquet", (tmp_path / "x.parquet").read_bytes())
    with pytest.raises(ValueError, match="\\(inputs\\."):
        _made(tmp_path / "rows", inputs)


def test_several_tasks_at_once_make_one_list_and_all_get_it(tmp_path, monkeypatch):
    inputs = [_scored(tmp_path / "x.parquet", [(f"http://a.example.com/{n}", "c", None) for n in range(50)])]
    waiting, told, judged = threading.Semaphore(0), [], []

    def tell(text: str, **_: object) -> None:
        if "waiting until it ends" in text:
            told.append(text)
            waiting.release()

    def judge_when_others_wait(*arguments):
        judged.append(all(waiting.acquire(timeout=60) for _ in range(2)))
        judge(*arguments)

    monkeypatch.setattr("data_prep.rows.normalise.print", tell, raising=False)
    monkeypatch.setattr("data_prep.rows.normalise.judge", judge_when_others_wait)
    with ThreadPoolExecutor(3) as pool:
        made = [pool.submit(_made, tmp_path / "rows", inputs) for _ in range(3)]
        rows = [one.result() for one in made]
    assert rows[0] == rows[1] == rows[2] and judged == [True]
    assert len(told) == 2
    assert not (tmp_path / "rows" / ".work").exists()


def test_rows_json_says_how_the_list_came_about(tmp_path):
    rows = _made(
        tmp_path / "rows", [_table(tmp_path / "list.tsv", [b"http://a.example.com/1\tone", b"x\ty"] * 3)]
    )
    record = json.loads((tmp_path / "rows" / "rows.json").read_text())
    assert record["settings"]["inputs"]["list.tsv"]["num_bytes"] == 93
    assert record["rejects"] == {"duplicate_url": 2, "url_scheme": 3} and rows.num_inputs == 6


def test_what_is_left_out_of_a_list_is_told(tmp_path, capsys):
    lines = [b"http://a.example.com/1.jpg\tone", b"http://a.example.com/2.jpg\t", b"no address\ttwo"]
    for _ in range(2):  # made, and found
        _made(tmp_path / "rows", [_table(tmp_path / "list.tsv", lines)])
        told = capsys.readouterr().err
        assert "1 of 3 rows; left out: " in told and "no_caption 1" in told and "rejects.parquet" in told


def test_a_list_of_which_nothing_is_left_names_the_option_and_binds_no_folder(tmp_path):
    table = _table(tmp_path / "list.tsv", [b"http://127.0.0.1/1.jpg\tone"])
    with pytest.raises(ValueError, match=r"url_private.*--allow-private"):
        _made(tmp_path / "rows", [table])
    assert _made(tmp_path / "rows", [table], allow_private=True).num_rows == 1
