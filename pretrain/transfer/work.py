"""What is done for one transfer: data, model, training, test, record."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_prep.schema import write_atomic
from pretrain import provenance
from pretrain.checkpoint import load_towers
from pretrain.config import Run
from pretrain.data.faults import BadSample
from pretrain.towers import Towers
from pretrain.transfer import detect, segment
from pretrain.transfer.backbone import load_trunk
from pretrain.transfer.examples import AnnotatedSet, Drops, Example
from pretrain.transfer.recipes import Detect, Segment
from pretrain.transfer.training import Draws, Machine, require_same, train

RESULT, DETECTIONS = "result.json", "detections.json"


@dataclass(frozen=True)
class Work:
    """One transfer."""

    step: Path  # folder of the checkpoint
    recipe: Segment | Detect
    name: str  # of the recipe
    out: Path
    is_frozen: bool = False
    seed: int = 0  # of the head's first weights, the order and the crops


def transfer(work: Work, train_set: AnnotatedSet, heldout: AnnotatedSet, machine: Machine) -> dict[str, Any]:
    """Trains, tests, writes `work.out`/result.json and returns it; started again, it goes on where it was.

    Raises ValueError when the folder holds a training with other numbers.
    """
    run, _, towers = load_towers(work.step)
    settings = {
        "checkpoint": str(work.step),
        "recipe": work.name,
        "numbers": json.loads(json.dumps(asdict(work.recipe))),
        "frozen": work.is_frozen,
        "seed": work.seed,
        "train_images": len(train_set),
        "heldout_images": len(heldout),
        "train_set": _identity(train_set),
        "heldout_set": _identity(heldout),
        "classes": list(heldout.names),
    }
    require_same(work.out, settings)
    torch.manual_seed(work.seed)
    task = "segment" if isinstance(work.recipe, Segment) else "detect"
    model, draw, loss_of = TASKS[task](run, towers, work.recipe, train_set)
    encoder = load_trunk(model, towers, is_frozen=work.is_frozen)
    model.to(machine.device)
    title = f"{work.step.name} {task}"
    draws = Draws(len(train_set), draw, work.seed)
    dropped = train(model, encoder, draws, loss_of, work.recipe.optimisation, machine, work.out, title=title)
    test_drops = Drops()
    found = _examples(heldout, machine, test_drops, f"{work.step.name} test")
    if task == "segment":
        counts = segment.count(model, work.recipe, heldout, found, machine.device)
        scores = segment.score(counts, heldout.names)
    else:
        things = detect.find(model, heldout, found, machine.device)
        write_atomic(work.out / DETECTIONS, json.dumps(things.detections).encode())
        scores = detect.score(things, heldout)
    left_out = Counter(train_set.dropped) + Counter(dropped)
    result = {
        "task": task,
        **settings,
        "scores": scores,
        "dropped": {"train": dict(left_out), "heldout": {**heldout.dropped, **test_drops.counts}},
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(machine.device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_atomic(work.out / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    return result


def _identity(examples: AnnotatedSet) -> dict[str, str]:
    """Which data it is: a set that was built anew under its old name is another one."""
    return {"path": str(examples.place.resolve()), "sha256": examples.sha256}


Built = tuple[nn.Module, Callable[[int], Any], Callable]


def _segment(run: Run, towers: Towers, recipe: Segment, examples: AnnotatedSet) -> Built:
    model = segment.Segmenter(run, towers, recipe, len(examples.names))
    return model, segment.Draw(examples, recipe, model.divisor), segment.loss_of


def _detect(run: Run, towers: Towers, recipe: Detect, examples: AnnotatedSet) -> Built:
    model = detect.HEADS[recipe.head](run, towers, recipe, len(examples.names), examples.has_masks)
    return model, detect.Draw(examples, recipe), detect.loss_of


TASKS: dict[str, Callable[..., Built]] = {"segment": _segment, "detect": _detect}


class Tested(Dataset):
    """The examples of a set, or why one cannot be used."""

    def __init__(self, examples: AnnotatedSet) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example | tuple[str, str]:
        try:
            return self.examples.example(index)
        except BadSample as error:
            return error.reason, str(error)


def _examples(heldout: AnnotatedSet, machine: Machine, drops: Drops, title: str) -> Iterator[Example]:
    loader = DataLoader(Tested(heldout), batch_size=None, num_workers=machine.workers)
    interval = 0.2 if sys.stderr.isatty() else 5.0  # seconds between two states of the bar
    for found in tqdm(loader, desc=title, unit=" image", mininterval=interval):
        if isinstance(found, Example):
            yield found
        else:
            drops.add(*found)
            drops.require_few("held-out images", len(heldout), machine.max_bad)


def table(result: dict[str, Any]) -> str:
    """The scores in per cent with their 95 % intervals."""
    scores = result["scores"]
    rows = [scores] if "accuracy" in scores else list(scores.values())
    lines = []
    for row in rows:
        if row["accuracy"] is None:
            lines.append(f"not measured: {row.get('reason', 'nothing of the kind in the held-out set')}")
            continue
        low, high = row["interval"]
        lines.append(
            f"{row['metric']:10} {100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}] of {row['n']} images"
        )
    return "\n".join(lines)
