"""Which data can be evaluated on? Our shards, and plain folders of images, one a class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.folder import find_classes, make_dataset

from data_prep.files import sha256_file
from data_prep.masks import IMAGES, MASK_FOLDERS, images_and_masks
from data_prep.schema import MANIFEST_NAME, Manifest
from pretrain.data.faults import BadSample
from pretrain.data.shards import ShardFolder
from pretrain.evaluate.apart import require_apart, resolved
from pretrain.evaluate.splits import SPLITS

# Suffix of a file -> name of the image in a sample.
SUFFIXES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}


@dataclass(frozen=True)
class Listing:
    """What a folder of class folders holds; of a data set of ours its Manifest says the same."""

    name: str
    split: str
    categories: tuple[str, ...]
    num_samples: int
    has_text: bool = False


class ClassFolders:
    """Samples FOLDER/CLASS/.../IMAGE by number, sorted; as ShardFolder, with the category in `cls`.

    FileNotFoundError without class folders, ValueError when one holds no image, or when they are no classes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._samples, categories = _samples(folder)
        self.manifest = Listing(folder.resolve().parent.name, folder.name, categories, len(self._samples))

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int) -> dict[str, bytes]:
        path, category = self._samples[index]
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise BadSample("unreadable", f"{path}: {error}") from error
        return {SUFFIXES[Path(path).suffix.lower()]: content, "cls": str(category).encode()}

    @property
    def files(self) -> list[str]:
        """Of the samples, in their order."""
        return [path for path, _ in self._samples]

    @property
    def sha256(self) -> str:
        """Of the names and sizes of the files, which are too many to read."""
        found = hashlib.sha256()
        for path in self.files:
            found.update(f"{os.path.relpath(path, self.folder)} {_size_of(path)}\n".encode())
        return found.hexdigest()

    def place(self, index: int) -> str:
        """The file of a sample."""
        return self._samples[index][0]

    def close(self) -> None:
        """Nothing stays open."""


def open_set(folder: Path) -> ShardFolder | ClassFolders:
    """The samples of a data set of either kind."""
    return ShardFolder(folder) if (folder / MANIFEST_NAME).is_file() else ClassFolders(folder)


def place_in(samples: ShardFolder | ClassFolders, index: int) -> str:
    """Where a sample lies, to be told."""
    if isinstance(samples, ClassFolders):
        return samples.place(index)
    shard, inside = samples.locate(index)
    return f"{samples.folder / samples.manifest.shards[shard].name} sample {inside}"


def is_set(folder: Path) -> bool:
    """Does a data set of either kind lie there?"""
    return (folder / MANIFEST_NAME).is_file() or _has_folders(folder)


def read_set(folder: Path) -> Manifest | Listing:
    """What a data set holds, validated as far as that is possible without reading images."""
    if (folder / MANIFEST_NAME).is_file() or not _has_folders(folder):
        return Manifest.read(folder)  # tells what is missing
    return ClassFolders(folder).manifest


def sha256_of(folder: Path) -> str:
    """By which a set that was built anew in a folder is told from the one before: of its manifest, which names the
    whole content, or of names and sizes.
    """
    manifest = folder / MANIFEST_NAME
    return sha256_file(manifest) if manifest.is_file() else ClassFolders(folder).sha256


def read_manifests(folders: Mapping[str, Path]) -> dict[str, Manifest | Listing]:
    """Manifests of both data sets; ValueError when they do not fit each other, or have files in common."""
    manifests = {split: read_set(folder) for split, folder in folders.items()}
    train, heldout = (manifests[split] for split in SPLITS)
    if train.categories != heldout.categories:
        odd = sorted(set(train.categories) ^ set(heldout.categories)) or ["the same names in another order"]
        raise ValueError(
            f"{folders['train']} has {len(train.categories)} categories, {folders['heldout']} has "
            f"{len(heldout.categories)}, and they must be the same (differing: {odd[:5]}): build both splits "
            "from one source"
        )
    if not train.categories and not heldout.has_text:
        raise ValueError(
            f"{folders['heldout']} has neither categories nor captions, so there is nothing to measure: "
            "name another data set"
        )
    require_apart(*(_files_of(folders[split], manifests[split]) for split in SPLITS))
    return manifests


def _files_of(folder: Path, manifest: Manifest | Listing) -> dict[str, str]:
    """What tells a file that holds images from others -> its place."""
    if isinstance(manifest, Manifest):  # a shard is the same wherever it was copied
        return {shard.sha256: str(folder / shard.name) for shard in manifest.shards if shard.num_samples}
    return resolved(ClassFolders(folder).files)


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # such as a link that leads nowhere: it is counted when it is read
        return -1


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() for path in folder.iterdir())


def _samples(folder: Path) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    names, number = find_classes(folder)
    _require_classes(folder, names)
    try:
        samples = make_dataset(folder, number, extensions=tuple(SUFFIXES))
    except FileNotFoundError as error:  # torchvision's, of classes without images
        raise ValueError(f"{folder}: {error}: add images or remove the folders") from error
    inside = {os.path.dirname(path) for path, _ in samples}
    if found := images_and_masks({os.path.relpath(path, folder) for path in inside}):
        raise ValueError(
            f"{folder} has images in {found[0]!r} and masks in {found[1]!r}, which would be measured as "
            "images: take the masks out of the folders of the classes, or rename what is no folder of masks"
        )
    return samples, tuple(names)


def _require_classes(folder: Path, names: list[str]) -> None:
    """ValueError where the folders are a set with masks or boxes: in which of them an image lies is no class."""
    found = {name.lower(): name for name in names}
    masks = next((found[name] for name in MASK_FOLDERS if name in found), None)
    if masks is None:
        return
    is_of_boxes = any(path.suffix == ".json" for path in (folder / masks).iterdir())
    if is_of_boxes or IMAGES in found:
        raise ValueError(
            f"{folder} holds the folders {names[:5]}, and a folder {masks!r} beside images is no class, but says "
            f"what they show: measure by `python -m pretrain.transfer {'detect' if is_of_boxes else 'segment'} RUN "
            "--data DIR`, or rename the folders if they are classes"
        )
