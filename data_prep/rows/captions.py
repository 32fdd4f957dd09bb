"""What does a raw caption become? One line of clean text, by the rule that its source asks for.

The result is in Unicode's NFC with single spaces and without control characters. `IS_TIDY` is a condition in SQL that
holds only for captions of which a rule changes nothing but spaces, as `WITH_SINGLE_SPACES` does, so that most of a
long list never reach Python.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from urllib.parse import unquote_plus

# Printable characters that are no spaces, join no other, and are in NFC by themselves, from first to last: ASCII,
# Latin with its marks, Cyrillic, dashes and quotes, the euro, the trade mark, kana, Chinese, Korean syllables.
TIDY = (
    (0x21, 0x7E), (0xA1, 0xAC), (0xAE, 0x24F), (0x400, 0x45F), (0x2010, 0x2027), (0x20AC, 0x20AC), (0x2122, 0x2122),
    (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3),
)  # fmt: skip
_ARE_TIDY = "".join(f"{chr(first)}-{chr(last)}" for first, last in TIDY)
IS_TIDY = {  # by rule; what only a rule for HTML or URLs would change is asked of it
    "plain": f"regexp_full_match({{caption}}, '[{_ARE_TIDY} ]*')",
    "unescaped": f"regexp_full_match({{caption}}, '[{_ARE_TIDY} ]*') AND NOT contains({{caption}}, '&')",
    "flickr": "false",
}
WITH_SINGLE_SPACES = (
    "CASE WHEN contains({caption}, '  ') OR starts_with({caption}, ' ') OR ends_with({caption}, ' ')"
    " THEN trim(regexp_replace({caption}, ' +', ' ', 'g')) ELSE {caption} END"
)
INVISIBLE = ("Cc", "Cs", "Cn", "Co")  # control, half a surrogate pair, unassigned, private use
_IN_THE_WAY = dict.fromkeys((0x00AD, 0x200B, 0x2060, 0xFEFF))  # soft hyphen, zero-width space and joiner, BOM
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,2000}>|<!--.{0,2000}?-->", re.DOTALL)
_URL = re.compile(r"(?:https?://|www\.)[^\s<>\"]+", re.IGNORECASE)


def plain(text: str) -> str:
    """The text as it is, but in NFC, on one line, without control characters."""
    text = unicodedata.normalize("NFC", text)
    if not text.isprintable():
        text = "".join(
            " " if char.isspace() else char for char in text if char.isspace() or not _is_invisible(char)
        )
    return " ".join(text.split())


def unescaped(text: str) -> str:
    """Entities of HTML become characters: "Tom &amp; Jerry" -> "Tom & Jerry"."""
    return plain(html.unescape(text))


def flickr(text: str) -> str:
    """A field of YFCC100M: decoded once from its URL form ("+" a space, "%2B" a plus), entities, no tags, no URLs."""
    return plain(_URL.sub(" ", _TAG.sub(" ", html.unescape(unquote_plus(text, errors="replace")))))


RULES: dict[str, Callable[[str], str]] = {"plain": plain, "unescaped": unescaped, "flickr": flickr}


def _is_invisible(char: str) -> bool:
    return unicodedata.category(char) in INVISIBLE or ord(char) in _IN_THE_WAY
