"""Which data sets does the command line mean?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.masks import MASK_FOLDERS
from data_prep.schema import MANIFEST_NAME
from pretrain.command import no_folder
from pretrain.evaluate.apart import require_apart
from pretrain.transfer.coco import CocoSet
from pretrain.transfer.examples import AnnotatedSet, look_at
from pretrain.transfer.formats import FORMATS
from pretrain.transfer.mask_folder import MaskFolder, MaskPlaces
from pretrain.transfer.masked_shards import MaskedShards

SPLITS = {
    "train": ("train", "train2017", "training"),
    "heldout": ("heldout", "val", "val2017", "validation", "test"),
}


@dataclass(frozen=True)
class Named:
    """What the user says of data."""

    data: Path | None = None  # folder of both sets
    train: Path | None = None
    heldout: Path | None = None
    images: Path | None = None  # folder that the file names of COCO's format are relative to


def open_sets(task: str, named: Named, max_bad: float) -> tuple[AnnotatedSet, AnnotatedSet]:
    """The sets that teach and test; FileNotFoundError and ValueError for what cannot be used."""
    opened = []
    for split, path in (("train", named.train), ("heldout", named.heldout)):
        if path is None and named.data is None:
            raise ValueError(f"no {split} data set is named: give --data DIR, or --{split}")
        opened.append(_open(task, path or _find(task, named.data, split), named.images, max_bad))
    train, heldout = opened
    require_apart(train.files, heldout.files)
    if train.names != heldout.names or train.category_ids != heldout.category_ids:
        odd = sorted(set(train.names) ^ set(heldout.names))[:5] or "the same names in another order"
        raise ValueError(
            f"the set that teaches has {len(train.names)} classes, the one that tests {len(heldout.names)}, and they "
            f"must be the same (differing: {odd}): take both from one source"
        )
    look_at(heldout, "held-out images", max_bad)
    return train, heldout


def _find(task: str, data: Path, split: str) -> Path:
    """Where a folder of two sets holds one of them."""
    if not data.is_dir():
        raise FileNotFoundError(f"--data {no_folder(data)}: name one with {FORMATS[task]} for each split")
    candidates = [data / name for name in SPLITS[split]]
    if task == "detect":
        names = ("instances_{}.json", "{}.json", "lvis_v1_{}.json")
        files = (data / "annotations" / name.format(part) for part in SPLITS[split] for name in names)
        candidates = [*files, data / SPLITS[split][0]]
    else:
        candidates += [data / "images" / name for name in SPLITS[split]]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"{data} holds none of {[str(path.relative_to(data)) for path in candidates]}: name the sets by --train "
            "and --heldout"
        )
    return found


def _open(task: str, path: Path, images: Path | None, max_bad: float) -> AnnotatedSet:
    if (path / MANIFEST_NAME).is_file():
        return MaskedShards(path, with_ground=task == "segment")
    if task == "segment" and (places := _mask_places(path)):
        return MaskFolder(places, max_bad)
    if task == "detect" and path.suffix == ".json" and path.is_file():
        return CocoSet(path, images or _images_of(path), max_bad)
    problem = "is in another format" if path.exists() else "is missing"
    raise FileNotFoundError(f"{path} {problem}: `{task}` reads {FORMATS[task]}")


def _mask_places(path: Path) -> MaskPlaces | None:
    """PATH/images beside PATH/masks; or PATH = ROOT/images/SPLIT beside ROOT/masks/SPLIT, as in ADE20k."""
    for name in MASK_FOLDERS:
        if (path / "images").is_dir() and (path / name).is_dir():
            classes = path / "classes.txt"
            return MaskPlaces(
                path / "images", path / name, classes if classes.is_file() else path.parent / "classes.txt"
            )
        root = path.parent.parent
        if path.parent.name == "images" and (root / name / path.name).is_dir():
            return MaskPlaces(path, root / name / path.name, root / "classes.txt")
    return None


def _images_of(path: Path) -> Path:
    """ROOT/train2017 or ROOT/images for ROOT/annotations/instances_train2017.json."""
    root = path.parent.parent
    split = path.stem.rpartition("_")[2]
    found = next((root / name for name in (split, f"{split}2017", "images") if (root / name).is_dir()), None)
    if found is None:
        raise FileNotFoundError(
            f"the images of {path} are in none of {root}/{{{split},{split}2017,images}}: name their folder by "
            "--images"
        )
    return found
