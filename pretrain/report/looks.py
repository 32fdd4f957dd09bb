"""What does the teacher of a checkpoint make of some images? Token grids, neighbours, best class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from pretrain.checkpoint import load_towers
from pretrain.config import Run
from pretrain.data.batch import NO_CATEGORY
from pretrain.data.text import Captions
from pretrain.evaluate.features import Pictures
from pretrain.evaluate.knn import nearest
from pretrain.evaluate.zero_shot import EmbedTexts, class_vectors, embed_captions
from pretrain.facts import DataFacts
from pretrain.models.pixels import normalise
from pretrain.report.gaze import watched
from pretrain.towers import Towers

IMAGES_AT_ONCE = 64
MAX_NAMES = 200  # class names that are scored: their texts cost more than the images


@dataclass(frozen=True)
class Shown:
    """Images of one data set as the encoder sees them."""

    views: UInt8[Tensor, "n 3 s s"]
    labels: Int[Tensor, " n"]  # into `categories`; NO_CATEGORY where there is none
    categories: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]  # of each image

    def name(self, place: int) -> str | None:
        """Category of one image, None where it has none."""
        label = int(self.labels[place])
        return None if label == NO_CATEGORY else self.categories[label]

    def of(self, places: Sequence[int]) -> Shown:
        """Some of the images."""
        kept = torch.tensor(places)
        captions = tuple(self.captions[place] for place in places)
        return Shown(self.views[kept], self.labels[kept], self.categories, captions)


@dataclass(frozen=True)
class Found:
    """Which images a checkpoint finds for one query each, best first."""

    similarity: Float[Tensor, "n k"]  # cosines
    places: Int[Tensor, "n k"]  # among those that were searched


@dataclass(frozen=True)
class Look:
    """What one checkpoint's teacher says of the held-out images."""

    step: int
    tokens: Float[Tensor, "n l d"]
    neighbours: Found  # training images, by the mean token
    by_caption: Found | None  # images of the gallery, by the texts of `asked`; None without text or captions
    names: Mapping[str, Float[Tensor, " n"]] | None  # cosines to class names; None without text or categories
    gaze: (
        Float[Tensor, "n g g"] | None
    )  # what the middle draws from each place; None where a block sees a window


def read_images(folder: Path, size: int, count: int) -> Shown:
    """`count` readable images spread evenly over a data set, with as many categories as they allow.

    ValueError when none is readable.
    """
    pictures = Pictures(folder, size)
    places = np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int)
    found = [picture for place in places if (picture := pictures[int(place)]).view is not None]
    pictures.shards.close()
    if not found:
        raise ValueError(
            f"none of {len(places)} images of {folder} can be read: run `python -m data_prep check {folder}`"
        )
    labels = torch.tensor([picture.label for picture in found])
    captions = tuple(picture.captions for picture in found)
    return Shown(torch.stack([p.view for p in found]), labels, pictures.shards.manifest.categories, captions)


def spread_over_categories(shown: Shown, count: int) -> Shown:
    """At most `count` of the images, one a category while that is possible, in the order of the categories."""
    rank_in_category: dict[int, int] = {}
    order = []
    for place, label in enumerate(shown.labels.tolist()):
        rank_in_category[label] = rank_in_category.get(label, 0) + 1
        order.append((rank_in_category[label], place))
    singles = [place for _, place in sorted(order)]
    if len(rank_in_category) > count:  # evenly over the categories, not the first of them
        firsts = sorted((int(shown.labels[p]), p) for p in singles[: len(rank_in_category)])
        chosen = [firsts[round(k)][1] for k in np.linspace(0, len(firsts) - 1, count)]
    else:
        chosen = singles[:count]
    return shown.of(sorted(chosen, key=lambda place: (int(shown.labels[place]), place)))


def asked(heldout: Shown) -> list[str]:
    """The first caption of each image that has one, each text once."""
    return list(dict.fromkeys(captions[0] for captions in heldout.captions if captions))


def some_names(shown: Shown) -> list[str]:
    """All categories, or MAX_NAMES of many: those of the images, and others spread evenly."""
    if len(shown.categories) <= MAX_NAMES:
        return list(shown.categories)
    own = [name for place in range(len(shown.views)) if (name := shown.name(place))]
    places = np.linspace(0, len(shown.categories) - 1, MAX_NAMES).round().astype(int)
    return list(dict.fromkeys([*own, *(shown.categories[place] for place in places)]))[:MAX_NAMES]


@torch.inference_mode()
def look(
    step: int,
    folder: Path,
    heldout: Shown,
    train: Shown,
    gallery: Shown,
    num_neighbours: int,
    tokenizer: Path | None,
) -> Look:
    """Runs one checkpoint's teacher over all sets, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run, facts, towers = load_towers(folder)
    towers = towers.to(device)
    with watched(towers.encoder) as gazes:
        tokens = torch.cat(
            [_tokens(towers, run, part, device) for part in heldout.views.split(IMAGES_AT_ONCE)]
        )
    candidates = [
        _tokens(towers, run, part, device).mean(dim=1) for part in train.views.split(IMAGES_AT_ONCE)
    ]
    neighbours = _nearest(torch.cat(candidates), tokens.mean(dim=1), num_neighbours)
    names = by_caption = None
    if facts.vocab_size and tokenizer is not None:
        captions = _captions(tokenizer, run, facts)
        if heldout.categories:
            chosen = some_names(heldout)
            scores = _name_scores(towers, tokens.to(device), chosen, captions).cpu()
            names = dict(zip(chosen, scores.T, strict=True))
        if texts := asked(heldout):
            parts = gallery.views.split(IMAGES_AT_ONCE)
            images = [_images(towers, _tokens(towers, run, part, device).to(device)).cpu() for part in parts]
            queries = embed_captions(texts, captions.encode, _text_tower(towers, device))
            by_caption = _nearest(torch.cat(images), queries, num_neighbours)
    return Look(step, tokens, neighbours, by_caption, names, torch.cat(gazes) if gazes else None)


def _nearest(images: Float[Tensor, "m d"], queries: Float[Tensor, "n d"], num: int) -> Found:
    return Found(*nearest(images, queries, min(num, len(images))))


def _tokens(
    towers: Towers, run: Run, views: UInt8[Tensor, "n 3 s s"], device: torch.device
) -> Float[Tensor, "n l d"]:
    return towers.encoder(normalise(views.to(device), run.views.mean, run.views.std, torch.float32)).cpu()


def _captions(tokenizer: Path, run: Run, facts: DataFacts) -> Captions:
    captions = Captions(tokenizer, run.text.length)
    if captions.vocab_size != facts.vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer} has {captions.vocab_size} words, the run was trained with "
            f"{facts.vocab_size}: name its own by --tokenizer"
        )
    return captions


def _images(towers: Towers, tokens: Float[Tensor, "n l d"]) -> Float[Tensor, "n e"]:
    """Images in the space of the captions, as unit vectors."""
    return towers.project_images(towers.embed_tokens(tokens))


def _text_tower(towers: Towers, device: torch.device) -> EmbedTexts:
    return lambda tokens, mask: towers.embed_texts(tokens.to(device), mask.to(device))


def _name_scores(
    towers: Towers, tokens: Float[Tensor, "n l d"], categories: Sequence[str], captions: Captions
) -> Float[Tensor, "n c"]:
    device = tokens.device
    classes = class_vectors(tuple(categories), captions.encode, _text_tower(towers, device))
    return _images(towers, tokens) @ classes.to(device).T
