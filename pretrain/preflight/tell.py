"""How is the state of a cluster told? One table, then every failure with its node and remedy; all of it as JSON."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_prep.files import write_atomic
from pretrain import strict_json
from pretrain.preflight.check import SKIPPED, Row
from pretrain.preflight.told import FAILED, WARNING, Place, Problem

MOST_NODES = 8  # named for one and the same problem
SHORTEST, WIDEST = 40, 90  # characters of a value in the table
HEADS = ("check", "", "value", "rule")


def table(rows: Sequence[Row], width: int | None = None) -> str:
    """A line a check; values and rules are folded to the terminal's width."""
    width = shutil.get_terminal_size((140, 24)).columns if width is None else width
    names = max(len(row.name) for row in rows) + 2
    part = min(max((width - names - 10) // 2, SHORTEST), WIDEST)
    lines = [f"{HEADS[0]:{names}}{HEADS[1]:9}{HEADS[2]:{part + 2}}{HEADS[3]}"]
    for row in rows:
        if row.status == SKIPPED:
            lines.append(f"{row.name:{names}}{'-':9}{row.value}")
            continue
        value, rule = (textwrap.wrap(text, part) or [""] for text in (row.value, row.rule))
        for number in range(max(len(value), len(rule))):
            texts = [texts[number] if number < len(texts) else "" for texts in (value, rule)]
            head = f"{row.name:{names}}{row.status:9}" if number == 0 else " " * (names + 9)
            lines.append(f"{head}{texts[0]:{part + 2}}{texts[1]}".rstrip())
    return "\n".join(lines)


def problem_lines(rows: Sequence[Row], status: str) -> list[str]:
    """`FAILED disk: node b (node 1, rank 8): value; rule; remedy`, the same of several nodes in one line."""
    lines = []
    for row in rows:
        alike: dict[tuple[str, str, str], list[Problem]] = {}
        for problem in row.problems:
            if problem.status == status:
                key = (problem.value, problem.rule or row.rule, problem.remedy)
                alike.setdefault(key, []).append(problem)
        for (value, rule, remedy), problems in alike.items():
            places = [problem.place for problem in problems if problem.place is not None]
            where = f"{_named(places)}: " if places else ""
            told = f"{value}; rule: {rule}; remedy: {remedy}" if remedy else value  # which says both itself
            lines.append(f"{status} {row.name}: {where}{told}")
    return lines


def _named(places: Sequence[Place]) -> str:
    """All ranks, or the first few; of a node whose ranks all say the same, once."""
    nodes = {place.node: place for place in sorted(places, reverse=True)}
    firsts = sorted(nodes.values())
    more = f" and {len(firsts) - MOST_NODES} more nodes" if len(firsts) > MOST_NODES else ""
    if len(firsts) == len(places) or len(firsts) > 1:
        return ", ".join(map(str, firsts[:MOST_NODES])) + more
    ranks = ", ".join(str(place.rank) for place in sorted(places))
    return f"node {firsts[0].host} (node {firsts[0].node}, ranks {ranks})"


def verdict(rows: Sequence[Row], seconds: float, where: str) -> str:
    """The last line."""
    failed, warned = (sum(row.status == status for row in rows) for status in (FAILED, WARNING))
    end = f"{failed} check{'s' * (failed > 1)} FAILED" if failed else "fit for training"
    warnings = f", {warned} with warnings" if warned else ""
    return f"preflight of {where}: {end}{warnings}, {seconds:.1f} s"


def text(rows: Sequence[Row], seconds: float, where: str) -> str:
    """Everything, failures last before the verdict."""
    parts = [
        table(rows),
        *problem_lines(rows, WARNING),
        *problem_lines(rows, FAILED),
        verdict(rows, seconds, where),
    ]
    return "\n".join(parts)


def write_report(path: Path, rows: Sequence[Row], seconds: float, found: Sequence[Any]) -> None:
    """JSON with every row, every problem and what every rank found; OSError where it cannot be written."""
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "passed": all(row.status != FAILED for row in rows),
        "seconds": round(seconds, 3),
        "checks": [dataclasses.asdict(row) for row in rows],
        "found": [dataclasses.asdict(one) for one in found],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (strict_json.dumps(record, indent=1, default=str) + "\n").encode())
