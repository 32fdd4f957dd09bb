"""Which vectors does a checkpoint give to the images of a data set?"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data_prep.schema import IMAGE_EXTENSIONS
from pretrain.collectives import rank, world_size
from pretrain.config import Run
from pretrain.data.batch import NO_CATEGORY
from pretrain.data.decode import decode_image
from pretrain.data.faults import BadSample, check_bad_share
from pretrain.data.text import captions_of
from pretrain.data.views import center_view
from pretrain.evaluate.cached import CachedTokens, TokenCache
from pretrain.evaluate.dense import NOTHING, DenseFeatures, Sampling, TokenCollector, chosen_images
from pretrain.evaluate.layers import LAYER, layer_means
from pretrain.evaluate.masks import Mask, read_mask
from pretrain.evaluate.published_texts import EncoderWithTexts
from pretrain.evaluate.sets import open_set, place_in, read_set
from pretrain.models.pixels import normalise

IMAGES_AT_ONCE = 128
REMEDY = (
    "mend or remove such images of a folder; build a data set again, `python -m data_prep check` says why"
)
MASKED, LAYERS, TOKENS = "masked tokens", "means of layers", "tokens"  # that `extract` keeps if asked


@dataclass(frozen=True)
class Features:
    """All that the probes read of one data set under one checkpoint, on the CPU; row i is sample `index[i]`."""

    tokens: Float[Tensor, "n d"]  # mean of the encoder's tokens
    embedding: Float[Tensor, "n e"] | None  # attention pooling and norm, if the run has trained them
    projected: Float[Tensor, "n e"] | None  # unit vectors in the space of the captions, if the run has text
    classified: Int[Tensor, " n"] | None  # the run's category that its own head says, if it has categories
    labels: Int[Tensor, " n"]  # category of the data set; NO_CATEGORY where a sample has none
    captions: list[tuple[str, ...]]  # all of a sample, empty where it has none
    index: Int[Tensor, " n"]  # of the sample in the data set
    dropped: dict[str, int]  # samples left out, by reason
    dense: DenseFeatures | None = None  # single tokens, if they were asked for and the data set has masks
    layers: dict[str, Float[Tensor, "n _"]] = field(
        default_factory=dict
    )  # means of the last layers, if asked
    cached: CachedTokens | None = None  # all tokens of some images, if they were asked for


@dataclass(frozen=True)
class Picture:
    """One sample as the encoder sees it, or why it cannot be seen."""

    index: int
    view: UInt8[Tensor, "3 s s"] | None
    label: int = NO_CATEGORY
    captions: tuple[str, ...] = ()
    mask: Mask | None = None
    reason: str = ""
    message: str = ""


class Pictures:
    """The samples of a data set, or those of some numbers, as views of `size` pixels; indexable, for torch's
    DataLoader.

    `view` makes one of an image and its sample number; the center view if left out. Of the samples `masked` the
    mask of the center view is read too, where they have one.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        samples: Sequence[int | None] | None = None,
        *,
        view: Callable[[Tensor, int], Tensor] | None = None,
        masked: frozenset[int] = frozenset(),
    ) -> None:
        self.shards = open_set(folder)
        self.size = size
        self.samples = range(len(self.shards)) if samples is None else samples
        self.view = view
        self.masked = masked

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> Picture:
        return self.of(self.samples[place], self.view)

    def of(self, index: int, view: Callable[[Tensor, int], Tensor] | None) -> Picture:
        """The sample of that number, as `view` shows it."""
        try:
            members = self.shards.sample(index)
            content = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
            if content is None:
                raise BadSample("no_image", f"sample {index} has none of {IMAGE_EXTENSIONS}")
            image = decode_image(content)
            mask = read_mask(members, *image.shape[:2], self.size) if index in self.masked else None
            shown = view(image, index) if view else center_view(image, self.size)
            return Picture(index, shown, self._label(members), _captions(members), mask)
        except BadSample as error:
            return Picture(index, None, reason=error.reason, message=str(error))

    def _label(self, members: dict[str, bytes]) -> int:
        text = members.get("cls", b"").strip()
        if not text:
            return NO_CATEGORY
        if not text.isdigit() or int(text) >= len(self.shards.manifest.categories):
            raise BadSample("bad_category", f"category {text[:20]!r} is no number of the manifest's list")
        return int(text)


class NoneReadable(ValueError):
    """No picture can be seen; `dropped` has the reasons."""

    def __init__(self, message: str, dropped: Counter[str]) -> None:
        super().__init__(message)
        self.dropped = dropped

    def __reduce__(self) -> tuple[type[NoneReadable], tuple[str, Counter[str]]]:
        return type(self), (str(self), self.dropped)


def readable(
    pictures: Pictures,
    dropped: Counter[str],
    *,
    limit: float,
    workers: int,
    title: str,
    share_of: int | None = None,
) -> Iterator[list[Picture]]:
    """The pictures that can be seen, some at once, with a progress bar named `title`.

    The others are counted in `dropped`, by reason. DataError when they exceed `limit` of those that were read, or of
    the `share_of` pictures that these are a share of; NoneReadable when no picture can be seen.
    """
    loader = DataLoader(pictures, IMAGES_AT_ONCE, num_workers=workers, collate_fn=list)
    interval = 0.2 if sys.stderr.isatty() else 5.0  # seconds between two states of the bar
    with tqdm(
        total=len(pictures), desc=title, disable=rank() > 0, unit=" image", mininterval=interval
    ) as bar:
        for batch in loader:
            good = [picture for picture in batch if picture.view is not None]
            dropped.update(picture.reason for picture in batch if picture.view is None)
            bar.update(len(batch))
            if bad := [picture for picture in batch if picture.view is None]:
                told = f"{place_in(pictures.shards, bad[-1].index)}: {bad[-1].message}"
                check_bad_share(dropped, share_of or bar.n, limit, told, remedy=REMEDY)
            if good:
                yield good
    if sum(dropped.values()) == len(pictures):
        raise NoneReadable(
            f"{pictures.shards.folder} has no readable image ({dict(dropped)}): build the data set again",
            dropped,
        )


@torch.inference_mode()
def extract(
    towers: nn.Module,
    run: Run,
    folder: Path,
    *,
    device: torch.device,
    workers: int,
    title: str,
    dense: Sampling = NOTHING,
    kept: frozenset[str] = frozenset({MASKED}),
) -> Features:
    """Features of every readable sample, in float32, with a progress bar named `title`.

    `kept` says what else is kept of the same pass, `dense` which of the masked tokens. Unreadable
    samples are left out and counted; DataError when they exceed `run.max_bad`. On several ranks each takes a share
    and keeps it; see `shares.divided`.
    """
    num_images = read_set(folder).num_samples
    if MASKED not in kept:
        dense = NOTHING
    own = range(rank() * num_images // world_size(), (rank() + 1) * num_images // world_size())
    pictures = Pictures(folder, run.views.size, own, masked=chosen_images(num_images, dense))
    cache = TokenCache(num_images, (run.views.size // towers.encoder.stride) ** 2 * towers.encoder.width)
    seen: list[Picture] = []
    vectors: dict[str, list[Tensor]] = {}
    dropped: Counter[str] = Counter()
    collector = TokenCollector(dense)
    share_of = num_images if world_size() > 1 else None
    options = {"limit": run.max_bad, "workers": workers, "title": title, "share_of": share_of}
    for good in readable(pictures, dropped, **options):
        views = torch.stack([picture.view for picture in good]).to(device)
        with layer_means(towers.encoder) if LAYERS in kept else nullcontext({}) as means:
            summary, tokens = _encoded(towers, normalise(views, run.views.mean, run.views.std, torch.float32))
        for name, value in (_embed(towers, tokens, summary) | means).items():
            vectors.setdefault(name, []).append(value.cpu())
        collector.add(tokens, [picture.mask for picture in good], [picture.index for picture in good])
        if TOKENS in kept:
            cache.add(tokens, [picture.index for picture in good])
        seen += [Picture(p.index, None, p.label, p.captions) for p in good]
    joined = {name: torch.cat(values) for name, values in vectors.items()}
    return Features(
        tokens=joined["tokens"],
        embedding=joined.get("embedding"),
        projected=joined.get("projected"),
        classified=joined.get("classified"),
        labels=torch.tensor([picture.label for picture in seen]),
        captions=[picture.captions for picture in seen],
        index=torch.tensor([picture.index for picture in seen]),
        dropped=dict(dropped),
        dense=collector.collected(),
        layers={name: value for name, value in joined.items() if name.startswith(LAYER)},
        cached=cache.collected(),
    )


def _encoded(
    towers: nn.Module, images: Float[Tensor, "n 3 s s"]
) -> tuple[Float[Tensor, "n d"] | None, Float[Tensor, "n l d"]]:
    """Summary, where that is the embedding of an image, and tokens."""
    if not isinstance(towers, EncoderWithTexts):
        return None, towers.encoder(images)
    found = towers.encoder(images, summary=True)
    return found[:, 0], found[:, 1:]


def _embed(
    towers: nn.Module, tokens: Float[Tensor, "n l d"], summary: Float[Tensor, "n d"] | None
) -> dict[str, Tensor]:
    vectors = {"tokens": tokens.mean(dim=1)}
    if not towers.has_embedding:
        return vectors
    embedding = vectors["embedding"] = towers.embed_tokens(tokens) if summary is None else summary
    if towers.has_texts:
        vectors["projected"] = towers.project_images(embedding)
    if towers.has_categories:
        vectors["classified"] = towers.category(embedding).argmax(dim=1)
    return vectors


def _captions(members: dict[str, bytes]) -> tuple[str, ...]:
    try:
        return tuple(captions_of(members))
    except BadSample as error:
        if error.reason == "no_caption":
            return ()
        raise
