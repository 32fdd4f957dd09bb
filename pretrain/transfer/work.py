"""What is done for one transfer: data, model, training, test, record."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_prep.files import write_atomic
from pretrain import provenance, strict_json
from pretrain.collectives import (
    from_every_rank,
    on_every_rank,
    rank,
    to_first_rank,
    world_size,
)
from pretrain.data.faults import BadSample
from pretrain.training_state import States
from pretrain.transfer import detect, segment
from pretrain.transfer.backbone import load_trunk
from pretrain.transfer.examples import AnnotatedSet, Drops, Example, shown_in
from pretrain.transfer.order import Draws, repeat_factors, share_of
from pretrain.transfer.pretrained import Pretrained, open_pretrained
from pretrain.transfer.recipes import Detect, Segment
from pretrain.transfer.training import STATE, Machine, train

RESULT, DETECTIONS = "result.json", "detections.json"


@dataclass(frozen=True)
class Work:
    """One transfer."""

    step: Path  # folder of the checkpoint; an export, its folder or a file in it
    recipe: Segment | Detect
    name: str  # of the recipe
    out: Path
    is_frozen: bool = False
    seed: int = 0  # of the head's first weights, the order and the crops


def transfer(
    work: Work, train_set: AnnotatedSet, heldout: AnnotatedSet, machine: Machine
) -> dict[str, Any] | None:
    """Trains, tests, writes `work.out`/result.json and returns it; started again, it goes on where it was.

    A collective call: the ranks share the training and the test, rank 0 alone writes, and the others get None. Raises
    ValueError when the folder holds a training with other numbers, or the ranks read other data.
    """
    pretrained = on_every_rank(lambda: open_pretrained(work.step))
    share_of(work.recipe.optimisation)
    settings = {
        "checkpoint": str(work.step),
        "weights": pretrained.weights,
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
    require_same_data(settings)
    torch.manual_seed(work.seed)
    task = "segment" if isinstance(work.recipe, Segment) else "detect"
    model, draw, loss_of = TASKS[task](pretrained, work.recipe, train_set)
    encoder = load_trunk(model, pretrained.encoder, is_frozen=work.is_frozen)
    model.to(machine.device)
    title = f"{work.step.name} {task}"
    draws = Draws(len(train_set), draw, work.seed, on_every_rank(lambda: _repeats(work, train_set)))
    states = States(work.out / STATE, settings, "transfer")
    dropped = train(model, encoder, draws, loss_of, work.recipe.optimisation, machine, states, title=title)
    bad: list[tuple[str, str]] = []  # reason and message
    found = _examples(heldout, machine, bad, f"{work.step.name} test")
    seen = on_every_rank(lambda: TESTS[task](model, work.recipe, heldout, found, machine.device))
    test_drops = drops_of(from_every_rank(bad))
    test_drops.require_few("held-out images", len(heldout), machine.max_bad)
    parts = to_first_rank(seen)
    if parts is None:
        return None
    left_out = Counter(train_set.dropped) + Counter(dropped)
    result = {
        "task": task,
        **settings,
        "scores": SCORES[task](parts, heldout, work.out),
        "dropped": {"train": dict(left_out), "heldout": {**heldout.dropped, **test_drops.counts}},
        "ranks": world_size(),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(machine.device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_atomic(work.out / RESULT, (strict_json.dumps(result, indent=1) + "\n").encode())
    return result


def require_own(out: Path) -> None:
    """FileExistsError for a folder that holds anything but a transfer."""
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not there or STATE in there or _is_result(out / RESULT):
        return
    unfinished = Path(STATE).with_suffix(".part").name  # of a transfer that was killed
    if foreign := [name for name in there if name != unfinished]:
        raise FileExistsError(
            f"--out {out} holds {', '.join(foreign[:3])}{', ...' * (len(foreign) > 3)} and no transfer, whose files "
            "would lie among them: name an empty or new folder"
        )


def _is_result(path: Path) -> bool:
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("task") in TASKS and "scores" in told


def require_same_data(settings: dict[str, Any]) -> None:
    """ValueError, on all ranks, where one of them was told something else or reads other files. Collective."""
    told = from_every_rank([json.dumps(settings | {"train_set": None, "heldout_set": None})])
    read = from_every_rank([(settings["train_set"]["sha256"], settings["heldout_set"]["sha256"])])
    for name, of_rank in (("settings", told), ("data sets", read)):
        if odd := [number for number, found in enumerate(of_rank) if found != of_rank[0]]:
            raise ValueError(
                f"rank {odd[0]} has other {name} than rank 0 ({of_rank[odd[0]]} and {of_rank[0]}): start all ranks "
                "with one command, on the same files"
            )


def _identity(examples: AnnotatedSet) -> dict[str, str]:
    """Which data it is: a set that was built anew under its old name is another one."""
    return {"path": str(examples.place.resolve()), "sha256": examples.sha256}


def _repeats(work: Work, train_set: AnnotatedSet) -> Tensor | None:
    """How often an epoch shows each example, where the recipe says so by their classes."""
    threshold = work.recipe.repeat if isinstance(work.recipe, Detect) else 0.0
    return repeat_factors(shown_in(train_set), threshold) if threshold else None


Built = tuple[nn.Module, Callable[[int], Any], Callable]


def _segment(pretrained: Pretrained, recipe: Segment, examples: AnnotatedSet) -> Built:
    model = segment.Segmenter(pretrained, recipe, len(examples.names))
    return model, segment.Draw(examples, recipe, model.divisor), segment.loss_of


def _detect(pretrained: Pretrained, recipe: Detect, examples: AnnotatedSet) -> Built:
    model = detect.HEADS[recipe.head](pretrained, recipe, examples)
    return model, detect.Draw(examples, recipe), detect.loss_of


def _score_segments(parts: list[Any], heldout: AnnotatedSet, out: Path) -> dict[str, Any]:
    return segment.score(torch.cat(parts), heldout.names)


def _score_detections(parts: list[Any], heldout: AnnotatedSet, out: Path) -> dict[str, Any]:
    found = detect.join(parts)
    write_atomic(out / DETECTIONS, json.dumps(found.detections).encode())
    return detect.score(found, heldout)


TASKS: dict[str, Callable[..., Built]] = {"segment": _segment, "detect": _detect}
TESTS: dict[str, Callable[..., Any]] = {"segment": segment.count, "detect": detect.find}
SCORES: dict[str, Callable[..., dict[str, Any]]] = {"segment": _score_segments, "detect": _score_detections}


class Tested(Dataset):
    """The examples of this rank's share of a set, or why one cannot be used."""

    def __init__(self, examples: AnnotatedSet) -> None:
        self.examples = examples
        self.own = range(rank() * len(examples) // world_size(), (rank() + 1) * len(examples) // world_size())

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, place: int) -> Example | tuple[str, str]:
        try:
            return self.examples.example(self.own[place])
        except BadSample as error:
            return error.reason, str(error)


def _examples(
    heldout: AnnotatedSet, machine: Machine, bad: list[tuple[str, str]], title: str
) -> Iterator[Example]:
    loader = DataLoader(Tested(heldout), batch_size=None, num_workers=machine.workers)
    interval = 0.2 if sys.stderr.isatty() else 5.0  # seconds between two states of the bar
    for found in tqdm(loader, desc=title, unit=" image", mininterval=interval):
        if isinstance(found, Example):
            yield found
        else:
            reason, message = found  # a list, as the loader converts it
            bad.append((reason, message))
            drops_of(bad).require_few("held-out images", len(heldout), machine.max_bad)


def drops_of(bad: list[tuple[str, str]]) -> Drops:
    """Counts of what was left out; reasons and messages."""
    drops = Drops()
    for reason, message in bad:
        drops.add(reason, message)
    return drops


def left_out(dropped: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A line for each of both sets that has lost examples or annotations."""
    return [
        f"left out of the {split} set: {', '.join(f'{reason} {counts[reason]}' for reason in sorted(counts))}"
        for split, counts in dropped.items()
        if counts
    ]


def table(result: dict[str, Any]) -> str:
    """The scores in per cent with their 95 % intervals."""
    scores = result["scores"]
    rows = [scores] if "accuracy" in scores else list(scores.values())
    lines = []
    for row in rows:
        if row["accuracy"] is None:
            lines.append(f"not measured: {row.get('reason', 'nothing of the kind in the held-out set')}")
            continue
        bounds = [f"{100 * bound:.1f}" for bound in row["interval"] or ()]
        sure = f"[{', '.join(bounds)}]" if bounds else "(no interval)"
        lines.append(f"{row['metric']:10} {100 * row['accuracy']:.1f} {sure} of {row['n']} images")
    return "\n".join(lines)
