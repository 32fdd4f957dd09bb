"""What has to be run for a comparison, and with which commands? No torch: a plan is shown in a second."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.schema import Manifest
from pretrain.compare.comparisons import Comparison, Variant
from pretrain.config import Run, Source
from pretrain.main import ROOT
from pretrain.recipes import rows

HELDOUT = ("heldout", "val", "test")  # folders beside train/ that may test the probes, first found first


@dataclass(frozen=True)
class Job:
    """One method with one seed: a pre-training run, and an evaluation on every set."""

    variant: Variant
    run: Run
    folder: Path
    train: tuple[str, ...]  # command
    evaluations: dict[str, tuple[str, ...]]  # set -> command

    @property
    def recipe(self) -> Path:
        """The file that the command reads the run from."""
        return self.folder / "asked.json"

    def result(self, name: str) -> Path:
        """Where the evaluation on a set is written."""
        return self.folder / f"evaluation-{name}.json"


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


# What a row may be given of a data set, in the order of preference: one label an image, as the paper compares.
SUPERVISION: dict[str, Callable[[Manifest], bool]] = {
    "category": lambda manifest: manifest.has_category,
    "text": lambda manifest: manifest.has_text,
    "tags": lambda manifest: bool(manifest.tags),
}


def sources(row: str, manifests: dict[str, Manifest]) -> dict[str, Source]:
    """Every data set by its size, with the first kind of label that the row predicts and the set has."""
    kinds = {target.kind for target in rows.OBJECTIVES[row].targets.values()}

    def labels(manifest: Manifest) -> str:
        fitting = (kind for kind, has in SUPERVISION.items() if kind in kinds and has(manifest))
        return next(fitting, "none")

    return {
        name: Source(labels(manifest), weight=manifest.num_samples)  # type: ignore[arg-type]
        for name, manifest in manifests.items()
    }


def run_of(
    variant: Variant, epochs: int, seed: int, settings: Settings, manifests: dict[str, Manifest]
) -> Run:
    """The recipe of one method on the comparison's data, budget and seed; `epochs` of that data at full size."""
    data = sources(variant.row, manifests)
    if settings.is_full:
        run = replace(rows.RECIPES.get(variant.row, rows.m3i.vit_b16)(), data=data)
        batch = settings.batch or run.batch
        steps = (
            settings.steps or epochs * sum(manifest.num_samples for manifest in manifests.values()) // batch
        )
        save_every = run.save_every
    else:
        run = rows.small(variant.row, data)
        batch, steps = settings.batch or run.batch, settings.steps or run.steps
        save_every = steps
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
    return variant.change(run)


def plan(comparison: Comparison, settings: Settings) -> list[Job]:
    """Every job, all methods of the first seed before those of the second; ValueError for what cannot work."""
    _check(comparison, settings)
    manifests = {name: Manifest.read(folder) for name, folder in settings.data.items()}
    splits = {name: split_folders(folder) for name, folder in settings.sets.items()}
    return [
        _job(
            variant,
            run_of(variant, comparison.epochs, seed, settings, manifests),
            settings,
            splits,
            place == 0,
        )
        for seed in settings.seeds
        for place, variant in enumerate(comparison.variants)
    ]


def split_folders(folder: Path) -> tuple[Path, Path]:
    """(training images, held-out images) of an evaluation set."""
    heldout = next((folder / name for name in HELDOUT if (folder / name).is_dir()), None)
    if heldout is None or not (folder / "train").is_dir():
        raise FileNotFoundError(
            f"{folder} must hold train/ and one of {', '.join(f'{name}/' for name in HELDOUT)}: "
            "`python -m data_prep build` makes them"
        )
    for split in (folder / "train", heldout):
        Manifest.read(split)
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
    for name, value in {"--steps": settings.steps, "--batch": settings.batch}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be positive")
    if settings.ranks < 1 or settings.fine_tune < 0:
        raise ValueError(
            f"--ranks {settings.ranks} must be positive and --fine-tune {settings.fine_tune} not negative"
        )


def _job(
    variant: Variant, run: Run, settings: Settings, splits: dict[str, tuple[Path, Path]], is_first: bool
) -> Job:
    """`is_first` of its seed: it is evaluated before training as well."""
    run.images_per_rank(settings.ranks)
    folder = settings.out / "runs" / f"{variant.name}-seed{run.seed}"
    launcher = [sys.executable, str(ROOT / "pretrain" / "main.py")]
    if settings.ranks > 1:
        launcher = [str(ROOT / "jobs" / "local" / "pretrain.sh")]
    train = [*launcher, "--recipe", str(folder / "asked.json"), "--out", str(folder), "--data"]
    train += [f"{name}={path}" for name, path in settings.data.items()]
    if variant.guide:
        train += ["--guide", str(settings.guides[variant.guide])]
    evaluations = {}
    for name, (examples, heldout) in splits.items():
        command = [sys.executable, "-m", "pretrain.evaluate", str(folder), "--train", str(examples)]
        command += ["--heldout", str(heldout), "--out", str(folder / f"evaluation-{name}.json")]
        command += ["--steps", "first,last" if is_first else "last", "--probes", "knn,linear,dense"]
        if settings.fine_tune:
            command += ["--fine-tune", str(settings.fine_tune)]
        evaluations[name] = tuple(command)
    return Job(variant, run, folder, tuple(train), evaluations)
