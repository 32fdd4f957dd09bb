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
from pretrain.evaluate.zero_shot import class_vectors
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

    def name(self, place: int) -> str | None:
        """Category of one image, None where it has none."""
        label = int(self.labels[place])
        return None if label == NO_CATEGORY else self.categories[label]


@dataclass(frozen=True)
class Look:
    """What one checkpoint's teacher says of the held-out images."""

    step: int
    tokens: Float[Tensor, "n l d"]
    similarity: Float[Tensor, "n k"]  # cosine of mean tokens to the nearest training images, best first
    neighbours: Int[Tensor, "n k"]  # their places among the training images
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
    return Shown(torch.stack([p.view for p in found]), labels, pictures.shards.manifest.categories)


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
    kept = torch.tensor(sorted(chosen, key=lambda place: (int(shown.labels[place]), place)))
    return Shown(shown.views[kept], shown.labels[kept], shown.categories)


def some_names(shown: Shown) -> list[str]:
    """All categories, or MAX_NAMES of many: those of the images, and others spread evenly."""
    if len(shown.categories) <= MAX_NAMES:
        return list(shown.categories)
    own = [name for place in range(len(shown.views)) if (name := shown.name(place))]
    places = np.linspace(0, len(shown.categories) - 1, MAX_NAMES).round().astype(int)
    return list(dict.fromkeys([*own, *(shown.categories[place] for place in places)]))[:MAX_NAMES]


@torch.inference_mode()
def look(
    step: int, folder: Path, heldout: Shown, train: Shown, num_neighbours: int, tokenizer: Path | None
) -> Look:
    """Runs one checkpoint's teacher over both sets, on the GPU if there is one."""
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
    similarity, neighbours = nearest(
        torch.cat(candidates), tokens.mean(dim=1), min(num_neighbours, len(train.views))
    )
    names = None
    if facts.vocab_size and tokenizer is not None and heldout.categories:
        chosen = some_names(heldout)
        scores = _name_scores(towers, run, facts, tokens.to(device), chosen, tokenizer).cpu()
        names = dict(zip(chosen, scores.T, strict=True))
    return Look(step, tokens, similarity, neighbours, names, torch.cat(gazes) if gazes else None)


def _tokens(
    towers: Towers, run: Run, views: UInt8[Tensor, "n 3 s s"], device: torch.device
) -> Float[Tensor, "n l d"]:
    return towers.encoder(normalise(views.to(device), run.views.mean, run.views.std, torch.float32)).cpu()


def _name_scores(
    towers: Towers, run: Run, facts: DataFacts, tokens: Tensor, categories: Sequence[str], tokenizer: Path
) -> Float[Tensor, "n c"]:
    captions = Captions(tokenizer, run.text.length)
    if captions.vocab_size != facts.vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer} has {captions.vocab_size} words, the run was trained with "
            f"{facts.vocab_size}: name its own by --tokenizer"
        )
    device = tokens.device
    classes = class_vectors(
        tuple(categories), captions.encode, lambda t, m: towers.embed_texts(t.to(device), m.to(device))
    )
    images = towers.project_images(towers.embed_tokens(tokens))
    return images @ classes.to(device).T
