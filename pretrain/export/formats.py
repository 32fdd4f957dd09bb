"""Which formats are there, and how does an export become whole and proven, or nothing?"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain.config import Run
from pretrain.export import (
    card,
    detectron2_file,
    huggingface,
    internimage,
    onnx_graph,
    openmmlab,
    safetensors_file,
    timm_folder,
    torchvision_folder,
)
from pretrain.export.agreement import Agreement
from pretrain.export.keys import Keys
from pretrain.export.names import FORMATS, NoToolkits
from pretrain.export.trained import Trained
from pretrain.full_disk import is_no_room
from pretrain.initial.files import KEYS, SHA256
from pretrain.intact import flush, followed, sha256
from pretrain.models.backbone import BACKBONES

REMEDY = "free space on that disk or name another --out"


@dataclass(frozen=True)
class Exporter:
    families: tuple[str, ...]  # backbone.family that the format can hold
    num_copies: int  # of the weights that it writes, at most
    write: Callable[[Trained, Path], dict[str, Keys]]
    prove: Callable[[Trained, Path], list[Agreement]]
    how_to_load: Callable[[Trained], str]
    parts: tuple[str, ...] | None = None  # modules of the towers that are read for it; None: all
    lets_go: bool = False  # of the towers before its proof, where no format follows: it comes last
    unproven: str = ""  # what the proof leaves open, since the toolkit cannot be had
    # What only the toolkits themselves can prove, by the interpreter that has them; NoToolkits without them.
    prove_in_toolkits: Callable[[Trained, Path, str], list[Agreement]] | None = None
    more_toolkits: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by family, beside those of all
    instead: dict[str, str] = field(
        default_factory=dict
    )  # by family that it cannot hold: what serves in its place


HEADED = ("encoder", "pool", "pool_norm", "norm", "category")  # what a classifier of images is made of

EXPORTERS: dict[str, Exporter] = {
    "huggingface": Exporter(
        tuple(huggingface.FAMILIES),
        1,
        huggingface.write,
        huggingface.prove,
        huggingface.how_to_load,
        HEADED,
        instead=huggingface.INSTEAD,
    ),
    "internimage": Exporter(
        ("internimage",),
        2,
        internimage.write,
        internimage.prove,
        internimage.how_to_load,
        HEADED,
    ),
    "openmmlab": Exporter(
        tuple(openmmlab.FAMILIES),
        2,
        openmmlab.write,
        openmmlab.prove,
        openmmlab.how_to_load,
        ("encoder",),
        prove_in_toolkits=openmmlab.prove_in_toolkits,
        more_toolkits={"vit": ("mmpretrain",)},
    ),
    "timm": Exporter(
        tuple(timm_folder.LAYOUTS),
        1,
        timm_folder.write,
        timm_folder.prove,
        timm_folder.how_to_load,
        ("encoder",),
    ),
    "safetensors": Exporter(
        tuple(BACKBONES),
        1,
        safetensors_file.write,
        safetensors_file.prove,
        safetensors_file.how_to_load,
    ),
    "torchvision": Exporter(
        tuple(torchvision_folder.NETWORKS),
        1,
        torchvision_folder.write,
        torchvision_folder.prove,
        torchvision_folder.how_to_load,
        ("encoder",),
    ),
    "onnx": Exporter(
        tuple(onnx_graph.GRAPHS),
        1,
        onnx_graph.write,
        onnx_graph.prove,
        onnx_graph.how_to_load,
        ("encoder",),
        lets_go=True,
    ),
    "detectron2": Exporter(
        ("vit",),
        1,
        detectron2_file.write,
        detectron2_file.prove,
        detectron2_file.how_to_load,
        ("encoder",),
        unproven=detectron2_file.NO_TOOLKIT,
    ),
}


assert tuple(EXPORTERS) == FORMATS


@dataclass(frozen=True)
class Exported:
    folder: Path
    keys: dict[str, Keys]  # by file
    proof: list[Agreement]
    unproven: str = ""  # what the proof leaves open, and why


def fitting(run: Run) -> list[str]:
    """Names of the formats that hold the run's backbone."""
    return sorted(name for name, exporter in EXPORTERS.items() if run.backbone.family in exporter.families)


def choose(name: str, run: Run) -> Exporter:
    """The exporter of a format; ValueError lists those that fit the run's backbone."""
    if name not in EXPORTERS:
        raise ValueError(
            f"--to {name!r} is unknown; choose from {sorted(EXPORTERS)} (this run fits {fitting(run)})"
        )
    if name not in fitting(run):
        raise ValueError(
            f"--to {name} holds backbones of the families {EXPORTERS[name].families}, this run trained "
            f"{run.backbone.family!r} ({run.backbone.size}); choose from {fitting(run)}"
            + EXPORTERS[name].instead.get(run.backbone.family, "")
        )
    return EXPORTERS[name]


def export(trained: Trained, name: str, folder: Path, python: str = sys.executable) -> Exported:
    """Writes a format into `folder`, proven; an earlier export there is replaced only then.

    `python` is the interpreter that has the toolkits, where a format is proven by them too. Where it has none,
    the export is kept and says what is not proven.

    Raises NotProven when the written files do not give the towers' features, ValueError for a format that
    does not fit, FileExistsError when `folder` holds anything but an export, OSError when the disk is full.
    In all these cases `folder` is as it was.
    """
    exporter, folder = choose(name, trained.run), followed(folder)
    with only_if_written([folder]):
        check_target(folder, name, exporter.num_copies * trained.num_bytes)
        return _written(exporter, trained, name, folder, python)


def _written(exporter: Exporter, trained: Trained, name: str, folder: Path, python: str) -> Exported:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        keys = exporter.write(trained, partial)
        with _being_flushed(partial):
            proof, unproven = _prove(exporter, trained, partial, python)
        record = {
            "format": name,
            "backbone": asdict(trained.run.backbone),
            "views": asdict(trained.run.views),
            "files": {file: told.record() for file, told in keys.items()},
            "proof": [asdict(agreement) for agreement in proof],
            "unproven": unproven,
            SHA256: _digests(partial, keys),
        }
        (partial / KEYS).write_text(json.dumps(record, indent=1) + "\n")
        (partial / "README.md").write_text(
            card.text(trained, name, keys, proof, exporter.how_to_load(trained), unproven)
        )
        publish(partial, folder)
    except Exception as error:  # of torch and safetensors too
        if not is_no_room(error):
            raise
        first = str(error).splitlines()[0]
        raise OSError(f"no space is left for {folder} ({first}): {REMEDY}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(folder, keys, proof, unproven)


@contextmanager
def only_if_written(folders: Iterable[Path]) -> Iterator[None]:
    """Where it fails, the folders above `folders` that were not there before are removed again if they are empty."""
    above = {parent for folder in folders for parent in followed(folder).parents if not parent.exists()}
    try:
        yield
    except BaseException:
        for parent in sorted(above, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):
                parent.rmdir()  # refuses what is not empty
        raise


def _digests(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files of weights, and of what lies beside one under its name, as a graph's weights do."""
    names = tuple(files)
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.name.startswith(names))
    return {path.name: sha256(path) for path in found}


def _prove(exporter: Exporter, trained: Trained, folder: Path, python: str) -> tuple[list[Agreement], str]:
    """What was compared, and what is left open."""
    proof, unproven = exporter.prove(trained, folder), exporter.unproven
    if exporter.prove_in_toolkits is not None:
        try:
            proof += exporter.prove_in_toolkits(trained, folder, python)
        except NoToolkits as error:
            unproven = (
                f"nothing was loaded in the toolkits: {error}; give --python an interpreter that has them"
            )
    return proof, unproven


@contextmanager
def _being_flushed(folder: Path) -> Iterator[None]:
    """The disk takes the files meanwhile, and has them at the end: it is as slow as the proof."""
    with ThreadPoolExecutor(1) as one:
        flushing = one.submit(lambda: [flush(path) for path in folder.iterdir()])
        yield
        flushing.result()


def check_target(folder: Path, name: str, num_bytes: int) -> None:
    """FileExistsError or OSError before anything is written; an export of the same format is no obstacle."""
    if folder.exists() and not (folder / KEYS).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is no export ({KEYS} is missing): give an empty or new folder as --out"
        )
    if (folder / KEYS).is_file():
        there = json.loads((folder / KEYS).read_text()).get("format", name)
        if there != name:
            raise FileExistsError(
                f"{folder} holds an export to {there}: name another --out for {name}, or delete it"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes:
        raise OSError(
            f"{free / 2**20:.0f} MiB are free for {folder}, it needs {num_bytes / 2**20:.0f} MiB: {REMEDY}"
        )


def publish(partial: Path, folder: Path) -> None:
    """Gives `partial` its name, in place of an earlier export."""
    for cache in [*partial.rglob("__pycache__")]:  # of the proof, which ran the shipped modules
        shutil.rmtree(cache)
    for path in (*partial.rglob("*"), partial):
        path.chmod(
            path.stat().st_mode | 0o044 | (0o011 if path.is_dir() else 0)
        )  # safetensors writes for one user
        flush(path)
    earlier = folder.with_name(f".{folder.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    if folder.exists():
        os.rename(folder, earlier)
    try:
        os.rename(partial, folder)
    except OSError:  # a name takes room too
        if earlier.exists():
            os.rename(earlier, folder)
        raise
    flush(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)
