"""How is a user's own collection read? Class folders, a tar per class, or images with a captions.tsv.

All three may lie in split folders (train, val, test, ...), and all but the tar per class in a single tar. The
order of the samples is a shuffle fixed by the seed, so that neighbours in a shard are not of one class.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import tyro

from data_prep.images import check_image
from data_prep.labels import fill_prompt
from data_prep.limits import BadImage, Limits
from data_prep.masks import IMAGES, MASK_FOLDERS, images_and_masks
from data_prep.places import Place, place_of
from data_prep.rows.inputs import is_folder
from data_prep.samples import Collection, Dropped, Made, Sample
from data_prep.sources.captions_table import clean_caption, read_table
from data_prep.sources.listing import FileRef, files_of, is_file, is_image_name, unreadable

VERSION = 2  # raise it when the same input gives other bytes
SPLITS = ("train", "trainval", "val", "valid", "validation", "heldout", "test")
CAPTIONS_NAME, CLASSES_NAME = "captions.tsv", "classes.tsv"
_DOUBLED_ARTICLE = re.compile(r"\b(a|an|the)\s+\{\}", re.IGNORECASE)
OVERHEAD = 5 * 1024  # bytes; tar headers, padding and .json of a sample, for the estimate


@dataclass(frozen=True)
class Item:
    """One image of the input, not read yet."""

    key: str
    name: str  # relative, as found
    ref: FileRef | None  # None: a table names it, but it is not there
    category: int | None
    captions: tuple[bytes, ...] | None  # raw; None where there is no table
    extra: Mapping[str, str] = field(default_factory=dict)
    is_row: bool = True  # False: stands for a row of a table that cannot be read


@dataclass(frozen=True)
class Folder:
    """Read images that are already there, on disk or behind a URL."""

    source: Annotated[str, tyro.conf.arg(name="from")]  # a folder, or a .tar; a path or a URL
    name: str = ""  # of the data set; that of the folder if empty
    seed: int = 0  # of the order of the samples
    min_side: int = Limits.min_side  # pixels; images with a shorter side are dropped
    # width x height of an input, from the header; larger images are dropped unread, and so are those that would be
    # stored larger than training takes: 64 Mi pixels, 32 Mi of WebP
    max_pixels: int = Limits.max_pixels
    max_aspect: float = Limits.max_aspect  # longer over shorter side; images beyond are dropped
    short_side: int = 0  # pixels; images whose short side is longer are reduced to it, 0 never
    prompts: tuple[str, ...] = ()  # captions of a class: {} becomes "a paper plane" for paper_plane

    def __post_init__(self) -> None:
        self._limits()  # says what is wrong with them
        for prompt in self.prompts:
            if "{}" not in prompt or _DOUBLED_ARTICLE.search(prompt):
                raise ValueError(
                    f"prompt {prompt!r} must hold {{}}, the class name with its article, and no article before it: "
                    'pass --prompts "a photo of {}."'
                )

    def collections(self) -> list[Collection]:
        """One collection a split folder, in the order train, ..., or one in all; categories are common to all."""
        source = place_of(self.source)
        if not is_file(source) and not is_folder(source):
            raise FileNotFoundError(f"{source} does not exist: pass --from a folder of images or a .tar")
        roots = {"train": source}
        if not is_file(source):
            there = source.folders()
            roots = {split: source.child(split) for split in SPLITS if split in there} or roots
        listings = {split: _list_split(root) for split, root in roots.items()}
        classes = {item for listing in listings.values() for item, _, _ in listing.images if item is not None}
        categories = _categories(classes, [*roots.values(), source])
        name = self.name or PurePosixPath(source.name).stem
        return [self._collection(name, split, listing, categories) for split, listing in listings.items()]

    def _limits(self) -> Limits:
        return Limits(self.min_side, self.max_pixels, max_aspect=self.max_aspect, short_side=self.short_side)

    def _collection(
        self, name: str, split: str, listing: _Listing, categories: tuple[str, ...]
    ) -> Collection:
        items = _items(listing, _slug(f"{name}-{split}"), categories, self.seed)
        if not items:
            raise ValueError(
                f"{listing.root} holds no images: it needs class folders, a tar per class, or images with a"
                f" {CAPTIONS_NAME}"
            )
        if self.prompts:
            items = [_with_captions(item, self.prompts, categories, listing) for item in items]
        limits = self._limits()
        sizes = [item.ref.size() if item.ref else 0 for item in items]
        settings: dict[str, Any] = {
            "source": "folder",
            "version": VERSION,
            "name": name,
            "seed": self.seed,
            "limits": asdict(limits),
            "inputs_sha256": _fingerprint(items, sizes),
        }
        if self.prompts:
            settings["prompts"] = list(self.prompts)
        make = partial(make_sample, source=name, categories=categories, limits=limits)
        is_split = listing.root != place_of(self.source)
        num_bytes = sum(sizes) + OVERHEAD * len(items)
        return Collection(
            name, split, is_split, categories, settings, items, make, num_bytes, tags=categories
        )


@dataclass(frozen=True)
class _Listing:
    root: Place
    images: list[tuple[str | None, str, FileRef]]  # (class, name, where)
    table: bytes | None  # captions.tsv
    table_folder: str  # names in the table are relative to it


def _list_split(root: Place) -> _Listing:
    files = files_of(root)
    tables = sorted(
        (name for name in files if name.rpartition("/")[2] == CAPTIONS_NAME), key=lambda n: n.count("/")
    )
    if tables:
        images = [(None, name, ref) for name, ref in files.items() if is_image_name(name)]
        return _Listing(root, images, files[tables[0]].read(), str(PurePosixPath(tables[0]).parent))
    tars = [name for name in files if name.endswith(".tar") and "/" not in name] if not is_file(root) else []
    if tars:
        images = [
            (Path(tar).stem, f"{tar}/{name}", ref)
            for tar in tars
            for name, ref in files_of(root.child(tar)).items()
            if is_image_name(name)
        ]
        return _Listing(root, images, None, ".")
    images = [(_class_of(name), name, ref) for name, ref in files.items() if is_image_name(name)]
    if len({kind is None for kind, _, _ in images}) > 1:
        loose = next(name for kind, name, _ in images if kind is None)
        raise ValueError(
            f"{root} mixes class folders and loose images such as {loose!r}: move them into a class folder"
        )
    kinds = {kind.lower(): kind for kind, _, _ in images if kind is not None}
    masks = next((kinds[name] for name in MASK_FOLDERS if name in kinds and IMAGES in kinds), None)
    found = images_and_masks({name.rpartition("/")[0] for _, name, _ in images})
    if found is None and masks is not None:  # apart from each other
        found = kinds[IMAGES], masks
    if found is not None:
        raise ValueError(
            f"{root} has images in {found[0]!r} and {found[1]!r}, where each folder is a class, but these are "
            "images and their masks: name the folder of the images alone, take the masks out of the folders of the "
            "classes, or rename them if they are classes themselves"
        )
    return _Listing(root, images, None, ".")


def _class_of(name: str) -> str | None:
    return name.rpartition("/")[0].rpartition("/")[2] or None


def _categories(classes: set[str], roots: Sequence[Place]) -> tuple[str, ...]:
    """Category names by number: those of the first classes.tsv (columns label, name) found, else sorted."""
    root = next((root for root in roots if root.exists(CLASSES_NAME)), None)
    if root is None or not classes:
        return tuple(sorted(classes))
    table, content = f"{root}/{CLASSES_NAME}", root.read(CLASSES_NAME).decode("utf-8-sig")
    rows = [line.split("\t") for line in content.splitlines() if line.strip()]
    header, body = [cell.strip() for cell in rows[0]], rows[1:]
    if "label" not in header or "name" not in header:
        raise ValueError(f"{table}: columns {header} lack 'label' or 'name': the first line must name both")
    try:
        named = {int(row[header.index("label")]): row[header.index("name")].strip() for row in body}
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{table}: {error}: every line needs an integer label and a name, tab-separated"
        ) from error
    if sorted(named) != list(range(len(body))) or len(set(named.values())) != len(body):
        raise ValueError(
            f"{table}: labels must be 0, 1, ..., {len(body) - 1}, each once, with different names"
        )
    categories = tuple(named[label] for label in range(len(body)))
    if unknown := sorted(classes - set(categories)):
        raise ValueError(
            f"{table} does not name the classes {unknown[:5]}: add a line for each, or remove the file"
        )
    return categories


def _items(listing: _Listing, prefix: str, categories: tuple[str, ...], seed: int) -> list[Item]:
    """All inputs in an order that the seed and the names fix; keys number that order."""
    number = {name: label for label, name in enumerate(categories)}
    found: list[dict[str, Any]] = []
    if listing.table is None:
        for kind, name, ref in listing.images:
            category = None if kind is None else number[kind]
            found.append({"name": name, "ref": ref, "category": category, "captions": None})
    else:
        told, bad_rows = read_table(listing.table, f"{listing.root}: {CAPTIONS_NAME}")
        base = PurePosixPath(listing.table_folder)
        told = {str(base / image): entry for image, entry in told.items()}
        refs = {name: ref for _, name, ref in listing.images}
        for name in sorted(told.keys() | refs.keys()):
            entry = told.get(name)
            captions = tuple(entry.captions) if entry else ()
            extra = entry.extra if entry else {}
            found.append(
                {"name": name, "ref": refs.get(name), "category": None, "captions": captions, "extra": extra}
            )
        for row in bad_rows:
            found.append({"name": row, "ref": None, "category": None, "captions": (), "is_row": False})
    found.sort(
        key=lambda one: hashlib.sha256(f"{seed}/{one['name']}".encode("utf-8", "surrogateescape")).digest()
    )
    return [Item(key=f"{prefix}-{index:08d}", **one) for index, one in enumerate(found)]


def _with_captions(
    item: Item, prompts: tuple[str, ...], categories: tuple[str, ...], listing: _Listing
) -> Item:
    """The item with every prompt as a caption of its class; ValueError where it has none, or captions already."""
    if listing.table is not None:
        raise ValueError(
            f"{listing.root} has a {CAPTIONS_NAME}, prompts make captions of class folders: leave out --prompts, or "
            f"remove the {CAPTIONS_NAME}"
        )
    if item.category is None:
        raise ValueError(
            f"{listing.root} has no class folders, prompts need the name of a class for every image such as "
            f"{item.name!r}: move the images into class folders, or leave out --prompts"
        )
    filled = (fill_prompt(prompt, categories[item.category]) for prompt in prompts)
    return replace(item, captions=tuple(caption.encode("utf-8", "surrogateescape") for caption in filled))


def _slug(text: str) -> str:
    return "".join(char if char.isascii() and (char.isalnum() or char in "_-") else "_" for char in text)


def _fingerprint(items: Sequence[Item], sizes: Sequence[int]) -> str:
    """Changes when a name, a size, a label or a caption of the input does."""
    digest = hashlib.sha256()
    for item, size in zip(items, sizes, strict=True):
        digest.update(
            repr((item.name, size, item.category, item.captions, dict(item.extra))).encode("utf-8", "replace")
        )
    return digest.hexdigest()


def make_sample(item: Item, *, source: str, categories: tuple[str, ...], limits: Limits) -> Made:
    """The sample of one item, or why there is none; a bad caption costs the image only when it was the last one.

    Raises OSError when the disk fails: only a file that is gone from a folder that is still there is left out.
    """
    name = item.name.encode("utf-8", "replace").decode()
    if not item.is_row:
        return Made(None, (Dropped(name, "caption_columns", "not as many cells as the header"),))
    if item.ref is None:
        return Made(None, (Dropped(name, "missing_image", f"named in {CAPTIONS_NAME}, not found"),))
    told, dropped = _captions(name, item.captions)
    if item.captions is not None and not told:
        return Made(None, dropped or (Dropped(name, "no_caption", f"not in {CAPTIONS_NAME}"),))
    try:
        content = item.ref.read(limits.max_bytes + 1)
        if len(content) < min(item.ref.size(), limits.max_bytes + 1):
            raise BadImage("truncated", f"{len(content)} of {item.ref.size()} bytes")
        image = check_image(content, limits)
    except BadImage as bad:
        return Made(None, (*dropped, Dropped(name, bad.reason, bad.detail)))
    except OSError as error:
        if item.ref.has_vanished():
            return Made(None, (*dropped, Dropped(name, "vanished", str(error))))
        raise unreadable(item.ref.path, error) from error
    record: dict[str, Any] = {"source": source, "source_name": name, "objects": [], "tags": []}
    record["phash"] = image.phash
    if item.category is not None:
        record["category"] = categories[item.category]
        record["tags"] = [[categories[item.category], 1.0]]
    if item.extra:
        record["extra"] = dict(item.extra)
    if image.changed:
        record["changed"] = image.changed
    sample = Sample(
        item.key, image.content, image.extension, image.size, tuple(told), item.category, record=record
    )
    return Made(sample, dropped)


def _captions(name: str, raw: Sequence[bytes] | None) -> tuple[list[str], tuple[Dropped, ...]]:
    told: list[str] = []
    dropped: list[Dropped] = []
    for caption in raw or ():
        text = clean_caption(caption)
        if not text:
            dropped.append(Dropped(name, "caption_empty", "nothing left but spaces and control characters"))
        elif text not in told:
            told.append(text)
    return told, tuple(dropped)
