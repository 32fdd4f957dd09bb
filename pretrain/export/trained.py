"""What is exported? The towers of one checkpoint and what is known of how they came to be."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoint import load_towers
from pretrain.config import Run
from pretrain.data.shards import NONE, ShardFolder
from pretrain.evaluate.checkpoints import unlike
from pretrain.facts import DataFacts
from pretrain.place import place_of
from pretrain.towers import Towers


@dataclass(frozen=True)
class Trained:
    run: Run
    facts: DataFacts
    towers: Towers  # float32, eval mode, CPU; what the format has no place for on the meta device
    which: str  # "teacher" or "student"
    step: str  # name of the checkpoint, "step_000400"
    state: dict[str, Any]  # state.json of the checkpoint: step, position, commit, versions
    evaluation: dict[str, Any] | None  # what `python -m pretrain.evaluate` found for these weights
    num_samples: dict[str, int]  # by source, of those that are known
    tokenizer: Path | None = None  # folder of the checkpoint's; None without text
    unevaluated: str = ""  # why a result under the name of this checkpoint is not its evaluation
    is_last: bool = False  # whether no other format follows, so that a proof may let the weights go
    # By image size, what `own_features` has computed.
    features: dict[int, dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_bytes(self) -> int:
        """Of the weights that were read."""
        return sum(p.numel() * p.element_size() for p in self.towers.parameters() if not p.is_meta)


def read_trained(
    run_folder: Path, step_folder: Path, which: str, parts: Collection[str] | None = None
) -> Trained:
    """The towers, of which `parts` are read and the others on the meta device (all are read if None).

    ValueError and FileNotFoundError when the checkpoint or evaluation.json is damaged.
    """
    run, facts, towers = load_towers(step_folder, which, parts)
    state = json.loads((step_folder / "state.json").read_text())
    evaluation, unevaluated = None, ""
    if which == "teacher":
        evaluation, unevaluated = evaluation_of(step_folder, run_folder / "evaluation.json")
    tokenizer = step_folder / "tokenizer"
    return Trained(
        run,
        facts,
        towers,
        which,
        step_folder.name,
        state,
        evaluation,
        count_samples(facts, run_folder / "data.json"),
        tokenizer if facts.vocab_size and tokenizer.is_dir() else None,
        unevaluated,
    )


def evaluation_of(step_folder: Path, path: Path) -> tuple[dict[str, Any] | None, str]:
    """What a result says of the teacher of a checkpoint, else None; why, where it is of another one of its name."""
    evaluation, name = read_evaluation(path), step_folder.name
    if evaluation is None or name not in evaluation["checkpoints"]:  # of an earlier one of the same run
        return None, ""
    told = unlike(evaluation, step_folder)
    return (None, f"{path.name} {told}") if told else (evaluation, "")


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """The evaluation of a run, or None when it has none."""
    if not path.is_file():
        return None
    try:
        evaluation = json.loads(path.read_text())
        assert isinstance(evaluation["checkpoints"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{path} is no result of `python -m pretrain.evaluate` ({error!r}): run that again, or delete the file"
        ) from error
    return evaluation


def count_samples(facts: DataFacts, path: Path) -> dict[str, int]:
    """Samples that a run was trained on, by source, as its checkpoint tells.

    Of an older one that does not tell: by the manifests of the data sets that data.json of the run names ({source:
    folder or URL}), as far as they are there and are the bytes that the run read.
    """
    if facts.num_samples:
        return dict(facts.num_samples)
    places = json.loads(path.read_text()) if path.is_file() else {}
    counts = {}
    for name, place in places.items():
        with contextlib.suppress(OSError, ValueError):  # moved, damaged, or a store that does not answer
            shards = ShardFolder(place_of(place), checked=NONE)
            if shards.sha256 == facts.sha256.get(f"data.{name}"):
                counts[name] = shards.manifest.num_samples
    return counts
