"""What is learned of captions that are longer than any caption?"""

from __future__ import annotations

import json
import random
import string
import time
from pathlib import Path

import pytest

from data_prep import tokenizer
from data_prep.schema import TOKENIZER_FOLDER
from data_prep.tokenizer import MOST_OF_WORD, train_tokenizer
from tests.data.sets import WORDS, write_set

ORDINARY = [
    "A red ant sees the sun; das Grün, don't 12:30",
    " ".join(WORDS * 200),
    "赤い猫が眠る" * 300,
    "ส้มโอหวานมาก" * 40,  # a word of 280 letters: no blanks
    "https://example.org/" + "a-b/" * 500,
]


def learned(folder: Path, captions: list[str]) -> dict[str, bytes]:
    """The files of a tokenizer."""
    write_set(folder, [[{"jpg": b"", "json": json.dumps({"captions": captions}).encode()}]])
    train_tokenizer(folder, ["000000.tar"], 8192)
    return {path.name: path.read_bytes() for path in (folder / TOKENIZER_FOLDER).iterdir()}


def test_the_bounds_change_nothing_of_ordinary_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded = learned(tmp_path / "bounded", ORDINARY)
    monkeypatch.setattr(tokenizer, "_bounded", lambda _, caption: caption)
    assert bounded == learned(tmp_path / "whole", ORDINARY)


def test_a_word_counts_as_its_first_letters(tmp_path: Path) -> None:
    long = ["the ant sees " + "ants" * MOST_OF_WORD + " and the sun"]
    short = ["the ant sees " + "ants" * (MOST_OF_WORD // 4) + " and the sun"]
    assert learned(tmp_path / "long", long) == learned(tmp_path / "short", short)


@pytest.mark.parametrize("letters", ["x", string.ascii_lowercase, "x "])
def test_a_caption_of_a_megabyte_takes_little_time(tmp_path: Path, letters: str) -> None:
    caption = "".join(random.Random(0).choices(letters, k=10**6))
    began = time.process_time()
    learned(tmp_path / "set", [caption])
    assert time.process_time() - began < 1  # a word of 30,000 other letters took 1 to 7 seconds
