"""Does a caption become one line of clean text, and is nothing of it lost that is text?"""

from __future__ import annotations

import random
import unicodedata

import duckdb
import pyarrow as pa
import pytest

from data_prep.rows.captions import (
    INVISIBLE,
    IS_TIDY,
    RULES,
    TIDY,
    WITH_SINGLE_SPACES,
    flickr,
    plain,
    unescaped,
)

TEXTS = [
    ("plain words", "plain words"),
    ("  two  spaces\tand\nlines ", "two spaces and lines"),
    ("e\u0301", "é"),
    ("zero\u200bwidth\ufeff", "zerowidth"),
    ("family 👨\u200d👩\u200d👧", "family 👨\u200d👩\u200d👧"),
    ("\u0e01\u0e33 \u0627\u0644", "\u0e01\u0e33 \u0627\u0644"),
    ("\x00\x1f\x7f\x85", ""),
    ("private \ue000use", "private use"),
    ("\u3000wide\u2003spaces", "wide spaces"),
    ("Tom &amp; Jerry", "Tom &amp; Jerry"),
]


@pytest.mark.parametrize(("text", "clean"), TEXTS)
def test_text_is_cleaned_once_and_for_all(text, clean):
    assert plain(text) == clean == plain(clean)


def _tidy_characters() -> str:
    """All that IS_TIDY takes, the space among it."""
    return " " + "".join(chr(code) for first, last in TIDY for code in range(first, last + 1))


def test_what_sql_takes_is_printable_and_in_nfc_beside_whatever_else_it_takes():
    characters = _tidy_characters()
    assert len(characters) > 30_000 and "é" in characters and "\u00ad" not in characters
    assert characters.isprintable() and not any(map(unicodedata.combining, characters))
    for marks in (
        "",
        " ",
        "e",
        "가",
        "か",
    ):  # a character that joins the one before would show beside one of these
        text = marks + marks.join(characters) + marks
        assert unicodedata.normalize("NFC", text) == text
    assert not [char for char in characters if unicodedata.category(char) in INVISIBLE]


@pytest.mark.parametrize("rule", RULES)
def test_what_sql_makes_of_a_caption_is_what_the_rule_makes_of_it(rule):
    letters = random.Random(0)
    common = "  ab&+%<>;é\u0301\u00ad\u1100\u1161가か\u3099\t" + _tidy_characters()[::997]
    texts = [text for pair in TEXTS for text in pair] + [
        "it's",
        '"quoted"',
        "a  b",
        " a",
        "a ",
        "50% off",
        "a+b",
        "",
    ]
    texts += ["".join(letters.choices(common, k=letters.randrange(9))) for _ in range(2000)]
    connection = duckdb.connect()
    connection.register("texts", pa.table({"c": texts}))
    condition, tidied = IS_TIDY[rule].format(caption="c"), WITH_SINGLE_SPACES.format(caption="c")
    taken = connection.sql(f"SELECT c, {tidied} FROM texts WHERE {condition}").fetchall()
    connection.close()
    assert [(text, RULES[rule](text)) for text, _ in taken] == taken
    assert rule == "flickr" or {"plain words", "it's", "50% off", "a  b"} <= {text for text, _ in taken}
    assert rule == "flickr" or len(taken) > 300


def test_entities_are_unescaped_where_the_source_says_so():
    assert unescaped("Tom &amp; Jerry&#39;s &lt;3 &nbsp; x") == "Tom & Jerry's <3 x"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("My+cat", "My cat"),
        ("C%2B%2B+code", "C++ code"),  # a plus that was encoded is no space
        ("Caf%C3%A9+%26amp%3B+bar", "Café & bar"),
        ("see+%3Ca+href%3D%22http%3A%2F%2Fx.com%2Fa%22%3Ehere%3C%2Fa%3E+now", "see here now"),
        ("at+http%3A%2F%2Fwww.flickr.com%2Fphotos%2F1+ok", "at ok"),
        ("%3Cb%3Ebold%3C%2Fb%3E%0Anext+line", "bold next line"),
        ("1+%3C+2+%3E+0", "1 < 2 > 0"),  # no tag
        ("50%25+off", "50% off"),
        ("100%", "100%"),
        ("%E9t%E9", "\ufffdt\ufffd"),
        ("www.example.com", ""),
    ],
)
def test_texts_of_flickr_are_decoded_once_and_freed_of_tags_and_addresses(raw, clean):
    assert flickr(raw) == clean
