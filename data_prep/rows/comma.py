"""What do the lines of a comma-separated table say, where quotes may hold commas and newlines?"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.rows.lines import MAX_TEXT, Block, decoded, open_compressed


def read_csv(path: Path, header: Sequence[str], block_rows: int = 100_000) -> Iterator[Block]:
    """The rows of a comma-separated file with quotes, cells in the order of `header`, which its first row must name.

    Rejects: columns (another number of cells than the first row), empty_line. Raises ValueError for a missing column
    and for a quote that never ends.
    """
    with open_compressed(path) as raw:
        texts = (decoded(line) for line in raw)
        reader = csv.reader(texts, strict=True)
        try:
            names = [name.strip().removeprefix("\ufeff") for name in next(reader, [])]
            if missing := [name for name in header if name not in names]:
                raise ValueError(
                    f"{path}: columns {names[:20]} lack {missing}: pass the published file with its first line"
                )
            places = [names.index(name) for name in header]
            block, before = Block(), reader.line_num
            for cells in reader:
                number, before = before + 1, reader.line_num
                if not cells:
                    block.rejects.append((number, "empty_line", ""))
                elif len(cells) != len(names):
                    block.rejects.append((number, "columns", ",".join(cells)[:MAX_TEXT]))
                else:
                    block.numbers.append(number)
                    block.rows.append([cells[place] for place in places])
                if len(block.rows) + len(block.rejects) >= block_rows:
                    yield block
                    block = Block()
            yield block
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: {error}; a quote must end: mend that line, or download it again"
            ) from error
