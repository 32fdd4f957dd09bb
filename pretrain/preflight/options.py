"""Which limits does the preflight hold a cluster to, and how are they changed?

Each has an environment variable, since a job script hands the same arguments to the preflight and to the training,
and an option of the same name for a start by hand.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Options:
    """Limits and choices; rank 0's hold for all ranks."""

    report: str = _option("", "file that gets everything as JSON, written by rank 0")
    only: str = _option("", "names of checks, by commas: these alone")
    skip: str = _option("", "names of checks, by commas: not these")
    connect_seconds: float = _option(60.0, "until all ranks must have met at MASTER_ADDR:MASTER_PORT")
    check_seconds: float = _option(60.0, "that one check may take before it counts as hanging")
    min_gb_s: float = _option(
        0.0, "all-reduce bus bandwidth, GB/s, that is required; 0: by the machines, see the table"
    )
    min_link: float = _option(
        0.5, "bandwidth between two nodes as a share of the median link's, below which it is slow"
    )
    min_speed: float = _option(0.8, "of a GPU as a share of the median GPU's, below which it is slow")
    max_skew: float = _option(1.0, "seconds between the clocks of two nodes")
    max_used_gib: float = _option(2.0, "memory of a GPU that is taken before the run, this process included")

    def __post_init__(self) -> None:
        problems = []
        for each in fields(self):
            value, is_time = getattr(self, each.name), each.name in ("connect_seconds", "check_seconds")
            if is_time and not value > 0:
                problems.append(f"{variable(each.name)}={value} must be positive: seconds, such as 60")
            elif each.type == "float" and not value >= 0:
                problems.append(f"{variable(each.name)}={value} must be a number, not negative")
        if problems:
            raise ValueError("; ".join(problems))

    def chosen(self, names: Sequence[str]) -> list[str]:
        """The checks that run, in their order; all names are of checks."""
        asked = {name: _listed(getattr(self, name)) for name in ("only", "skip")}
        return [
            name
            for name in names
            if name not in asked["skip"] and (not asked["only"] or name in asked["only"])
        ]


def variable(name: str) -> str:
    return f"PREFLIGHT_{name.upper()}"


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def read_options(
    arguments: Sequence[str], checks: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[Options, list[str]]:
    """The options, and the arguments that are none of them; ValueError that tells everything that is wrong.

    `checks` are the names that may be chosen.
    """
    environment = os.environ if environment is None else environment
    parser = argparse.ArgumentParser(prog="python -m pretrain.preflight", add_help=False, allow_abbrev=False)
    parser.add_argument("--local_rank", type=int)  # added by the launcher
    for each in fields(Options):
        parser.add_argument(option(each.name), dest=each.name)
    given, rest = parser.parse_known_args(list(arguments))
    values: dict[str, Any] = {}
    problems = []
    for each in fields(Options):
        text = getattr(given, each.name)
        text = environment.get(variable(each.name)) if text is None else text
        if text is None or (text == "" and each.type == "float"):
            continue
        try:
            values[each.name] = float(text) if each.type == "float" else text
        except ValueError:
            problems.append(f"{variable(each.name)}={text!r} must be a number, such as {each.default:g}")
    for name in ("only", "skip"):
        if unknown := sorted(set(_listed(values.get(name, ""))) - set(checks)):
            problems.append(f"{variable(name)}={','.join(unknown)} is unknown; choose from {list(checks)}")
    try:
        options = Options(**values)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return options, rest


def as_record(options: Options) -> dict[str, Any]:
    return asdict(options)


def help_text() -> str:
    """A line an option: its variable, its option, what it is, its default."""
    lines = []
    for each in fields(Options):
        default = f" ({each.default:g})" if each.type == "float" else ""
        lines.append(f"  {variable(each.name)} or {option(each.name)}: {each.metadata['help']}{default}")
    return "\n".join(lines)
