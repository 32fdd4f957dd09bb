"""Does a caption become one line of clean text, and is nothing of it lost that is text?"""

from __future__ import annotations

import duckdb
import pytest

from data_prep.rows.captions import IS_PLAIN_CAPTION, RULES, flickr, plain, unescaped

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


def test_what_sql_takes_as_plain_is_what_every_rule_but_flickr_leaves_as_it_is():
    texts = [text for pair in TEXTS for text in pair] + [
        "it's",
        '"quoted"',
        "a  b",
        " a",
        "a ",
        "50% off",
        "a+b",
    ]
    connection = duckdb.connect()
    condition = IS_PLAIN_CAPTION.format(caption="c")
    taken = [
        t for t in texts if connection.execute(f"SELECT {condition} FROM (SELECT ? AS c)", [t]).fetchone()[0]
    ]
    connection.close()
    assert {"plain words", "it's", "50% off"} <= set(taken) and "a  b" not in taken
    assert all(rule(text) == text for name, rule in RULES.items() if name != "flickr" for text in taken)


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
