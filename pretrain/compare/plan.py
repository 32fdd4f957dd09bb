"""What has to be run for a comparison, and with which commands?"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.files import sha256_file
from data_prep.schema import MANIFEST_NAME, Manifest
from pretrain.arguments import ROOT, override
from pretrain.compare.comparisons import Comparison, Variant
from pretrain.config import Run, Source
from pretrain.objective import LABELS
from pretrain.objectives import OBJECTIVES
from pretrain.recipes import rows

HELDOUT = ("heldout", "val", "test")  # folders beside train/ that may test the probes, first found first
PROBES = ("knn", "linear", "dense")  # of pretrain.evaluate
TRAIN = "train"  # name of the task that pre-trains
ALL_STEPS = "first,last"  # checkpoints of a run that is evaluated untrained as well
NEIGHBOURS = 20  # of pretrain.evaluate's kNN: a set needs as many training images
ENDS = 2**20  # bytes of a guide's file that tell whether it is another one
OWNED = ("--name", "--seed", "--steps", "--batch")  # fields of a recipe that the comparison decides
SAVES = 3  # checkpoints of a small run, from which an interrupted one goes on


@dataclass(frozen=True)
class Task:
    """One command, and what beside the recipe decides its result."""

    name: str  # TRAIN, or that of the evaluation set
    command: tuple[str, ...]
    asked: dict[str, Any]  # JSON types


@dataclass(frozen=True)
class Job:
    """One method with one seed: a pre-training run, and an evaluation on every set."""

    variant: Variant
    run: Run
    folder: Path
    tasks: tuple[Task, ...]  # training first

    @property
    def recipe(self) -> Path:
        """The file that the command reads the run from."""
        return self.folder / "asked.json"

    @property
    def sets(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks if task.name != TRAIN)

    def result(self, name: str) -> Path:
        """Where the evaluation on a set is written."""
        return self.folder / f"evaluation-{name}.json"

    def todo(self, task: Task) -> Path:
        """Says what a task is asked; a file for each way of asking, since printed commands name it."""
        way = hashlib.sha256(json.dumps(task.asked, sort_keys=True).encode()).hexdigest()[:8]
        return self.folder / f"todo-{task.name}-{way}.json"

    def done(self, name: str) -> Path:
        """The same of a task that is finished."""
        return self.folder / f"done-{name}.json"


@dataclass(frozen=True)
class Settings:
    """What is the same for all methods of a comparison."""

    data: dict[str, Path]  # name -> data set to pre-train on
    sets: dict[str, Path]  # name -> folder with train/ and held-out images for the probes
    guides: dict[str, Path]
    out: Path
    seeds: tuple[int, ...]
    is_full: bool = False  # the papers' size in place of the small one
    steps: int | None = None  # in place of the recipe's
    batch: int | None = None
    fine_tune: int = 0  # epochs; 0: not done
    ranks: int = 1  # processes a run
    overrides: tuple[str, ...] = ()  # of every recipe, as the command line writes them: --views.size 128


# What a row may be given of a data set, in the order of preference: one label an image, as the papers compare.
SUPERVISION: dict[str, Callable[[Manifest], bool]] = {
    "category": lambda manifest: manifest.has_category,
    "text": lambda manifest: manifest.has_text,
    "tags": lambda manifest: bool(manifest.tags),
}


def sources(variant: Variant, manifests: dict[str, Manifest]) -> dict[str, Source]:
    """Every data set by its size, with the first kind of label that the row predicts and the set has.

    ValueError when the row predicts labels and no data set has any of them.
    """
    kinds = {target.kind for target in OBJECTIVES[variant.row].targets.values()}

    def labels(manifest: Manifest) -> str:
        return next((kind for kind, has in SUPERVISION.items() if kind in kinds and has(manifest)), "none")

    found = {
        name: Source(labels(manifest), weight=manifest.num_samples)  # type: ignore[arg-type]
        for name, manifest in manifests.items()
    }
    wanted = sorted(kinds & set(LABELS))
    if wanted and all(source.supervision == "none" for source in found.values()):
        raise ValueError(
            f"variant {variant.name!r} predicts {wanted}, none of the data sets {sorted(manifests)} has such labels: "
            "leave it out by --only, or name other --data"
        )
    return found


def run_of(
    variant: Variant, epochs: int, seed: int, settings: Settings, manifests: dict[str, Manifest]
) -> Run:
    """The recipe of one method on the comparison's data, budget and seed; `epochs` of that data at full size."""
    data = sources(variant, manifests)
    run = replace(rows.full(variant.row), data=data) if settings.is_full else rows.small(variant.row, data)
    batch, steps = settings.batch or run.batch, settings.steps or run.steps
    save_every = -(-steps // SAVES)
    if settings.is_full:
        num_images = sum(manifest.num_samples for manifest in manifests.values())
        steps, save_every = settings.steps or epochs * num_images // batch, run.save_every
    warmup = max(round(run.optim.warmup / run.steps * steps), 1)  # the same share of the budget
    run = replace(
        run,
        name=f"compare.{variant.name}",
        batch=batch,
        steps=steps,
        optim=replace(run.optim, warmup=warmup),
        seed=seed,
        save_every=save_every,
    )
    if settings.overrides:
        run = override(run, list(settings.overrides))
    return variant.change(run)


def plan(comparison: Comparison, settings: Settings) -> list[Job]:
    """Every job, all methods of the first seed before those of the second; ValueError for what cannot work."""
    _check(comparison, settings)
    manifests = {name: Manifest.read(folder) for name, folder in settings.data.items()}
    data = {name: _manifest_sha256(folder) for name, folder in settings.data.items()}
    guides = {name: _fingerprint(folder) for name, folder in settings.guides.items()}
    splits = {name: split_folders(folder) for name, folder in settings.sets.items()}
    jobs = []
    for seed in settings.seeds:
        for place, variant in enumerate(comparison.variants):
            run = run_of(variant, comparison.epochs, seed, settings, manifests)
            run.images_per_rank(settings.ranks)
            folder = settings.out / "runs" / f"{variant.name}-seed{run.seed}"
            asked = {"data": data, "guide": guides.get(variant.guide)}
            train = Task(TRAIN, _train_command(variant, folder, settings), asked)
            steps = ALL_STEPS if place == 0 else "last"  # untrained networks differ by seed alone
            evaluations = [_evaluation(name, folder, splits[name], steps, settings) for name in splits]
            jobs.append(Job(variant, run, folder, (train, *evaluations)))
    return jobs


def split_folders(folder: Path) -> tuple[Path, Path]:
    """(training images, held-out images) of an evaluation set."""
    heldout = next((folder / name for name in HELDOUT if (folder / name).is_dir()), None)
    if heldout is None or not (folder / "train").is_dir():
        raise FileNotFoundError(
            f"{folder} must hold train/ and one of {', '.join(f'{name}/' for name in HELDOUT)}: "
            "`python -m data_prep build` makes them"
        )
    train, other = Manifest.read(folder / "train"), Manifest.read(heldout)
    if not train.has_category or not other.has_category:
        raise ValueError(f"{folder} has no categories, which the probes tell apart: name another set")
    if train.categories != other.categories:
        raise ValueError(
            f"{folder / 'train'} has {len(train.categories)} categories and {heldout} {len(other.categories)}, which "
            "must be the same: build both splits from one source"
        )
    if train.num_samples < NEIGHBOURS:
        raise ValueError(
            f"{folder / 'train'} has {train.num_samples} images, kNN needs {NEIGHBOURS}: name a larger set"
        )
    return folder / "train", heldout


def _check(comparison: Comparison, settings: Settings) -> None:
    if len(set(settings.seeds)) != len(settings.seeds):
        raise ValueError(
            f"--seeds {list(settings.seeds)} names one twice: equal runs say nothing of the spread"
        )
    if set(comparison.guides) != set(settings.guides):
        raise ValueError(
            f"--guide names {sorted(settings.guides)}, this comparison needs {sorted(comparison.guides)}: give "
            "NAME=DIR once for each"
        )
    for name, value in {
        "--steps": settings.steps,
        "--batch": settings.batch,
        "--ranks": settings.ranks,
    }.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be positive")
    for name in settings.sets:
        if name == TRAIN or not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(
                f"--sets {name}=... names files: take letters, digits, . _ and -, and not {TRAIN!r}"
            )
    if owned := [word for word in settings.overrides if word.partition("=")[0] in OWNED]:
        raise ValueError(
            f"{owned[0]} is the comparison's to decide: leave it out, or say --seeds, --steps, --batch"
        )
    if settings.fine_tune < 0:
        raise ValueError(f"--fine-tune {settings.fine_tune} must be epochs: 0 for none")


def _train_command(variant: Variant, folder: Path, settings: Settings) -> tuple[str, ...]:
    command = [sys.executable, str(ROOT / "pretrain" / "main.py")]
    if settings.ranks > 1:
        command = ["env", f"RANKS={settings.ranks}", str(ROOT / "jobs" / "local" / "pretrain.sh")]
    command += ["--recipe", str(folder / "asked.json"), "--out", str(folder), "--data"]
    command += [f"{name}={path}" for name, path in settings.data.items()]
    if variant.guide:
        command += ["--guide", str(settings.guides[variant.guide])]
    return tuple(command)


def _evaluation(name: str, folder: Path, splits: tuple[Path, Path], steps: str, settings: Settings) -> Task:
    examples, heldout = splits
    command = [sys.executable, "-m", "pretrain.evaluate", str(folder), "--train", str(examples)]
    command += ["--heldout", str(heldout), "--out", str(folder / f"evaluation-{name}.json")]
    command += ["--steps", steps, "--probes", ",".join(PROBES)]
    if settings.fine_tune:
        command += ["--fine-tune", str(settings.fine_tune)]
    asked = {
        "train": _manifest_sha256(examples),
        "heldout": _manifest_sha256(heldout),
        "probes": list(PROBES),
        "fine_tune": settings.fine_tune,
        "steps": steps,
    }
    return Task(name, tuple(command), asked)


def _manifest_sha256(folder: Path) -> str:
    return sha256_file(folder / MANIFEST_NAME)


def _fingerprint(folder: Path) -> str:
    """Changes when a file of a guide is replaced; its bytes are many, and pre-training hashes them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    told = [(str(path.relative_to(folder)), path.stat().st_size, _ends(path)) for path in files]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _ends(path: Path) -> str:
    """SHA-256 of the first and the last ENDS bytes of a file: another training changes them everywhere."""
    with path.open("rb") as file:
        first = file.read(ENDS)
        file.seek(max(path.stat().st_size - ENDS, 0))
        return hashlib.sha256(first + file.read()).hexdigest()
