"""What do the lines of a table without quoting say? Every line gives a row or a reject, whatever its bytes are.

Tab-separated tables of the web hold stray quotes, bytes that are no UTF-8, and lines with too many cells; a CSV
parser loses whole stretches of them without a word. Here a line ends at a newline, a cell at a tab, and nothing
else matters. Compressed files (.gz, .bz2, .xz) are read as they are.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 8 * 2**20  # bytes read at a time
MAX_LINE = 2**20  # bytes; a longer line is a reject, and is never held in memory as a whole
MAX_TEXT = 2000  # characters of a reject that are kept
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # first bytes -> how to open
Split = Callable[[str], list[str]]  # a line -> its cells; may raise BadLine


class BadLine(Exception):
    """A line that is no row of its table; `reason` is one word for the count."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Block:
    """Some consecutive lines of a file: cells by column, and what was no row."""

    numbers: list[int] = field(default_factory=list)  # of the rows; the first line of the file is 1
    rows: list[Sequence[str]] = field(default_factory=list)
    rejects: list[tuple[int, str, str]] = field(default_factory=list)  # line number, reason, text
    num_repaired: int = 0  # rows with a cell that was no UTF-8 and was read as Windows-1252


def tabs(line: str) -> list[str]:
    """The cells of a line between tabs."""
    return line.split("\t")


def read_lines(path: Path, num_columns: int | None, split: Split = tabs, skip: int = 0) -> Iterator[Block]:
    """The rows of a file, a few MiB at a time. `num_columns`: cells a row must have, None = any number from one up.

    `skip` lines at the beginning are a header. Rejects: empty_line, columns, line_too_long, and those
    of `split`. Raises ValueError for a
    file in UTF-16 or with a broken compression.
    """
    number = 0
    for content in _lines_in_blocks(path):
        block = Block()
        try:
            lines, is_utf8 = content.decode("utf-8").split("\n"), True
        except UnicodeDecodeError:
            lines, is_utf8 = [_decoded(line) for line in content.split(b"\n")], False
        for line in lines:
            number += 1
            if number <= skip:
                continue
            if not is_utf8:
                line, is_repaired = line
                block.num_repaired += is_repaired
            try:
                cells = _cells(line.removesuffix("\r"), num_columns, split)
            except BadLine as bad:
                block.rejects.append((number, bad.reason, line[:MAX_TEXT].replace("\0", "")))
            else:
                block.numbers.append(number)
                block.rows.append(cells)
        yield block


TOO_LONG = "\0line too long\0"  # stands for such a line; it holds what no line of text begins with


def _cells(line: str, num_columns: int | None, split: Split) -> list[str]:
    if line == "":
        raise BadLine("empty_line")
    if line == TOO_LONG:
        raise BadLine("line_too_long")
    cells = split(line)
    if num_columns is not None and len(cells) != num_columns:
        raise BadLine("columns")
    return cells


def _decoded(line: bytes) -> tuple[str, bool]:
    """The text of a line, cell by cell in UTF-8 or else in Windows-1252, and whether one was in the latter."""
    try:
        return line.decode("utf-8"), False
    except UnicodeDecodeError:
        return "\t".join(decoded(cell) for cell in line.split(b"\t")), True


def decoded(cell: bytes) -> str:
    """The text of a cell: UTF-8, or else Windows-1252, where it can be neither with U+FFFD."""
    try:
        return cell.decode("utf-8")
    except UnicodeDecodeError:
        return cell.decode("cp1252", "replace")


def _lines_in_blocks(path: Path) -> Iterator[bytes]:
    """Whole lines, joined by newlines and without the last one; a line above MAX_LINE is replaced by a mark."""
    rest = b""
    is_first, is_skipping = True, False
    with open_compressed(path) as file:
        while True:
            content = _read(file, path)
            if is_first:
                if content[:2] in UTF16_MARKS:
                    raise ValueError(f"{path} is in UTF-16, a table must be in UTF-8: convert it with iconv")
                content, is_first = content.removeprefix(b"\xef\xbb\xbf"), False
            if not content:
                break
            if is_skipping:
                end = content.find(b"\n")
                if end < 0:
                    continue
                content, is_skipping = content[end + 1 :], False
            content = rest + content
            end = content.rfind(b"\n")
            whole, rest = (content[:end], content[end + 1 :]) if end >= 0 else (None, content)
            if len(rest) > MAX_LINE:
                whole = TOO_LONG.encode() if whole is None else whole + b"\n" + TOO_LONG.encode()
                rest, is_skipping = b"", True
            if whole is not None:
                yield whole if len(whole) <= MAX_LINE else _without_long(whole)
    if rest:
        yield rest


def _without_long(content: bytes) -> bytes:
    lines = content.split(b"\n")
    if max(map(len, lines)) <= MAX_LINE:
        return content
    return b"\n".join(line if len(line) <= MAX_LINE else TOO_LONG.encode() for line in lines)


def open_compressed(path: Path) -> io.BufferedIOBase:
    """A file for reading, unpacked on the way when its first bytes say that it is packed."""
    with open(path, "rb") as file:
        start = file.read(8)
    for mark, opener in OPENERS.items():
        if start.startswith(mark):
            return opener(path, "rb")
    return open(path, "rb")


def _read(file: io.BufferedIOBase, path: Path) -> bytes:
    try:
        return file.read(BLOCK)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} ends too early or is damaged ({error}): copy it again") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
