"""What did a run leave in its folder? Recipe, log, evaluation, data folders and checkpoints, read once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import intact, strict_json
from pretrain.command import no_folder
from pretrain.config import Run
from pretrain.evaluate.checkpoints import COPIES, UNTOLD, unlike
from pretrain.facts import DataFacts
from pretrain.place import Place, place_of

EVALUATION = "evaluation.json"
_STEP = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Record:
    """A run on disk. What an interrupted or fresh run has not written yet is empty or None."""

    folder: Path
    run: Run
    log: tuple[Mapping[str, Any], ...]  # lines of log.jsonl by step
    num_broken_lines: int  # of log.jsonl; a killed run may leave one
    checkpoints: Mapping[int, Path]  # step -> whole checkpoint folder, oldest first
    facts: DataFacts | None  # of the newest checkpoint
    state: Mapping[str, Any]  # of the newest checkpoint: versions, commit, world, stage, dtype
    evaluation: Mapping[str, Any]  # of evaluation.json what is said of this run's weights
    data: Mapping[str, Place]  # source of the recipe -> its data set
    tokenizer: Path | None
    left_out: str = ""  # what of evaluation.json is not said of this run's weights, and why

    def series(self, *path: str) -> tuple[list[float], list[float]]:
        """Steps and values of one quantity of the log, where it was logged: `series("nats", "text")`."""
        steps, values = [], []
        for line in self.log:
            value: Any = line
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, int | float):
                steps.append(line["step"])
                values.append(float(value))
        return steps, values

    def measured(self, target: str) -> dict[int, Mapping[str, float]]:
        """Step -> what was measured of a target's features, where that was logged."""
        lines = ((line["step"], (line.get("collapse") or {}).get(target)) for line in self.log)
        return {step: values for step, values in lines if values}

    def names(self, group: str) -> list[str]:
        """Quantities of a group of the log ("nats", "collapse") in the order of the recipe, then as logged."""
        logged = {name: None for line in self.log for name in line.get(group) or {}}
        ordered = [name for name in self.run.objective.targets if name in logged]
        return ordered + [name for name in logged if name not in ordered]


def read_record(folder: Path, data: Mapping[str, Place], tokenizer: Path | None = None) -> Record:
    """Everything the report needs from the run folder; `data` overrides the folders that training recorded.

    FileNotFoundError when `folder` is no run, ValueError when a file in it cannot be read or `data` names a
    source that the recipe lacks.
    """
    checkpoints = _whole_checkpoints(folder)
    newest = next(reversed(checkpoints.values()), None)
    run = _read_run(folder, newest)
    unknown = sorted(data.keys() - run.data.keys())
    if unknown:
        raise ValueError(
            f"--data names {unknown}, the recipe {run.name} has {sorted(run.data)}; use these names"
        )
    log, num_broken = _read_log(folder / "log.jsonl")
    facts, state = None, {}
    if newest is not None:
        facts = DataFacts.from_json((newest / "facts.json").read_text())
        state = json.loads((newest / "state.json").read_text())
        if tokenizer is None and (newest / "tokenizer").is_dir():
            tokenizer = newest / "tokenizer"
    evaluation, left_out = own_evaluation(folder, _read_json(folder / EVALUATION), checkpoints)
    recorded = {
        name: place_of(place) for name, place in _read_json(folder / "data.json").items() if name in run.data
    }
    return Record(
        folder=folder,
        run=run,
        log=tuple(log),
        num_broken_lines=num_broken,
        checkpoints=checkpoints,
        facts=facts,
        state=state,
        evaluation=evaluation,
        data={**recorded, **data},
        tokenizer=tokenizer,
        left_out=left_out,
    )


def own_evaluation(
    folder: Path, evaluation: Mapping[str, Any], checkpoints: Mapping[int, Path]
) -> tuple[dict[str, Any], str]:
    """A result without the checkpoints of other weights than this run's of the same names; and which these are.

    One that is gone cannot be compared: it counts as the run's where another one of the same result is.
    """
    measured = evaluation.get("checkpoints") or {}
    if not measured:
        return dict(evaluation), ""
    there = {path.name: path for path in checkpoints.values()}
    for path in (folder / COPIES / name for name in measured):  # of a run whose checkpoints lie behind a URL
        if path.name not in there and intact.verify(path, hashes=False) is None:
            there[path.name] = path
    odd = {name: unlike(evaluation, there[name]) for name in measured if name in there}
    is_own = "" in odd.values()
    weights = evaluation.get("weights") or {}
    for name in (name for name in measured if name not in there):
        odd[name] = (
            ""
            if is_own and weights.get(name)
            else f"is of a {name} that is not there"
            if weights.get(name)
            else UNTOLD
        )
    told = ", ".join(dict.fromkeys(why for why in odd.values() if why))
    kept = {name: rows for name, rows in measured.items() if not odd[name]}
    if not kept:
        return {}, told
    confusion = evaluation.get("confusion") or {}
    return {
        **evaluation,
        "checkpoints": kept,
        "confusion": confusion if confusion.get("checkpoint") in kept else None,
    }, told


def _whole_checkpoints(folder: Path) -> dict[int, Path]:
    found = {}
    for path in sorted((folder / "checkpoints").glob("step_*")):
        match = _STEP.fullmatch(path.name)
        if match and intact.verify(path, hashes=False) is None:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def _read_run(folder: Path, checkpoint: Path | None) -> Run:
    if not folder.is_dir():
        raise FileNotFoundError(f"{no_folder(folder)}: name the --out folder of a pre-training run")
    places = [folder / "recipe.json"] + ([checkpoint / "run.json"] if checkpoint else [])
    for path in places:
        if path.is_file():
            try:
                return Run.from_json(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path} does not describe a run of this version: {error}") from error
    raise FileNotFoundError(
        f"{folder / 'recipe.json'} is missing, so {folder} is no run: name the --out folder of a pre-training run"
    )


def _read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Lines by rising step, the later one where a step stands twice, and how many lines were unreadable."""
    by_step: dict[int, dict[str, Any]] = {}
    num_broken = 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = strict_json.loads(line)
            by_step[int(entry["step"])] = entry
        except (ValueError, KeyError, TypeError):
            num_broken += bool(line.strip())
    return [by_step[step] for step in sorted(by_step)], num_broken


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = strict_json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it and write it anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object: delete it and write it anew")
    return content
