"""What does a raw caption become? One line of clean text, by the rule that its source asks for.

The result is in Unicode's NFC with single spaces and without control characters; `IS_PLAIN_CAPTION` is a condition in
SQL that holds only for captions which every rule but `flickr` leaves as they are.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from urllib.parse import unquote_plus

IS_PLAIN_CAPTION = "regexp_full_match({caption}, '[!-%''-~]+( [!-%''-~]+)*')"  # printable ASCII, no ampersand
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
