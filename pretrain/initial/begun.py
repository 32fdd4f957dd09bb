"""With which weights did a run begin, and are they those that its command names now? OUT/init.json tells."""

from __future__ import annotations

import dataclasses
import json

from pretrain.checkpoint import place_name, read_json
from pretrain.collectives import from_first_rank
from pretrain.config import Run
from pretrain.facts import DataFacts
from pretrain.initial.start import Start, found, open_start
from pretrain.intact import write_text
from pretrain.paths import Paths
from pretrain.place import Place

INIT_RECORD = "init.json"  # in a run's folder: the weights that it began with


def record(paths: Paths, start: Start) -> None:
    """Keeps what was read of `--init`, for the starts that go on."""
    told = {"named": place_name(paths.init.place)} | start.record()
    write_text(paths.out / INIT_RECORD, json.dumps(told, indent=1))


def beginning(
    run: Run, paths: Paths, facts: DataFacts, folder: Place | None
) -> tuple[Start | None, DataFacts]:
    """The weights of `--init`, on all ranks the same, and the facts with the bytes by which they are known.

    None without them, and where a run goes on: the bytes that it began with are known by their place then, as a
    run that they came from may have other checkpoints now.
    """
    if paths.init is None:
        return None, facts
    digest = from_first_rank(lambda: _known_start(paths, folder))
    start = None
    if digest is None:
        init = dataclasses.replace(paths.init, place=from_first_rank(lambda: found(paths.init.place)))
        start = open_start(init, run, facts)
        digest = start.sha256
    facts = dataclasses.replace(facts, sha256=facts.sha256 | {"init": digest})
    return (start if folder is None else None), facts


def _known_start(paths: Paths, folder: Place | None) -> str | None:
    """SHA-256 of the weights that a run began with which goes on from `folder`; None if others are named now.

    ValueError for a damaged record of them.
    """
    told = paths.out / INIT_RECORD
    if folder is None or not told.is_file():
        return None
    try:
        named = json.loads(told.read_text())["named"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{told} is damaged ({error!r}): it must name the weights that the run began with; delete it, then "
            "what --init names is read again and compared with what the run began with"
        ) from error
    if named != place_name(paths.init.place):
        return None
    return read_json(folder, "facts.json").get("sha256", {}).get("init")
