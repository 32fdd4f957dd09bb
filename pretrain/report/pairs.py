"""What does the network see? The first pairs of the run, from the training loader at the run's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from data_prep.schema import IMAGE_EXTENSIONS
from pretrain.config import Run
from pretrain.data.batch import NO_TAG, Batch
from pretrain.data.decode import decode_image
from pretrain.data.faults import BadSample
from pretrain.data.loader import Loader
from pretrain.data.order import Order
from pretrain.data.sources import OpenSource, Sources, open_sources
from pretrain.data.steps import MAX_TRIED, run_order, tried_draws
from pretrain.data.text import Captions
from pretrain.objective import LABELS
from pretrain.place import Place
from pretrain.visualize.correspondence import landing, tinted_view
from pretrain.visualize.markup import Child, Html, element, figure, key
from pretrain.visualize.picture import Outline, mask_picture, outlined, pixels

VIEW_COLOURS = ("var(--image_same)", "var(--image_other)")  # of view 1 and view 2


@dataclass(frozen=True)
class Example:
    """One image of a batch and where it came from."""

    image: UInt8[np.ndarray, "h w 3"]  # whole, not flipped
    views: UInt8[Tensor, "2 3 s s"]
    boxes: Tensor  # [2, 5]: top, left, height, width in the flipped image's frame, flipped
    source: str
    key: str
    caption: str | None
    category: str | None
    tags: tuple[str, ...] | None


@dataclass(frozen=True)
class Pair:
    """The images of one input; two of them when the objective mixes."""

    examples: tuple[Example, ...]
    mask: np.ndarray  # bool [g, g], of view 1: True where the second image shows, or nothing


def read_pairs(run: Run, folders: Mapping[str, Place], tokenizer: Path | None, count: int) -> list[Pair]:
    """The first `count` inputs of the run: its positions 0, 1, ... whatever its batch.

    Where training would stop for more bad samples than run.max_bad they are shown all the same: DataError is left for
    data of which nothing can be made. ValueError or FileNotFoundError when the folders do not fit the recipe, as in
    training.
    """
    mixed = run.objective.input.mixed
    has_text = any(source.supervision == "text" for source in run.data.values())
    tokenizer = tokenizer if has_text else None
    looked_at = replace(run, batch=count * mixed, max_bad=1.0)
    with closing(Loader(looked_at, folders, tokenizer, rank=0, world=1)) as loader:
        batch = next(loader)
    sources = open_sources(run, folders, tokenizer)
    order = run_order(run, sources)
    examples = [_example(batch, place, order, sources) for place in range(count * mixed)]
    masks = batch.mask.view(count, run.objective.input.views, run.grid, run.grid)[:, 0].numpy()
    return [Pair(tuple(examples[mixed * k : mixed * (k + 1)]), masks[k]) for k in range(count)]


def _example(batch: Batch, place: int, order: Order, sources: Sources) -> Example:
    """The sample behind one row of the batch: training replaces a bad one by the next of its source."""
    number, draw = order.draw(int(batch.position[place]))
    source = sources.opened[number]
    tokens = batch.tokens[place] if batch.has_text[place] else None
    category = sources.categories[batch.category[place]] if batch.has_category[place] else None
    sure = batch.tags[place][batch.tags[place] != NO_TAG].tolist()
    tags = tuple(sources.tags[tag] for tag in sure) if batch.has_tags[place] else None
    for tried in tried_draws(draw):
        pick = order.pick(number, tried)
        try:
            key, members = source.shards.read(pick.shard, pick.index)
            source.category(members)
            source.tags(members)
            encoded = next(members[ext] for ext in IMAGE_EXTENSIONS if ext in members)
            caption = None if tokens is None else _caption(source, members, sources.captions, tokens)
            image = decode_image(encoded).numpy()
        except (BadSample, StopIteration):
            continue
        views, boxes = batch.views[place], batch.boxes[place]
        return Example(image, views, boxes, source.name, key, caption, category, tags)
    raise ValueError(
        f"{MAX_TRIED} samples of {source.name!r} in turn are bad: run `python -m data_prep check`"
    )


def _caption(source: OpenSource, members: Mapping[str, bytes], captions: Captions, tokens: Tensor) -> str:
    """The caption of a sample that became `tokens`. BadSample where there is none, as in training."""
    for caption in source.captions(members):
        if torch.equal(captions.encode(caption)[0], tokens):
            return caption
    raise BadSample("no_caption", "no caption of the sample gives these tokens")


def pair_pictures(pairs: list[Pair], run: Run) -> Html:
    """One card a pair: whole images with boxes, views, mask, mixed input, and where target patches land."""
    needs_other = run.objective.needs_other_view()
    return element("div", [_card(k, pair, run, needs_other) for k, pair in enumerate(pairs)], class_="pairs")


def _card(number: int, pair: Pair, run: Run, needs_other: tuple[bool, ...]) -> Html:
    is_mixed = len(pair.examples) == 2
    names = ("image i", "image j") if is_mixed else ("image",)
    rows = [
        _image_row(example, name, needs_other[slot], run)
        for slot, (example, name) in enumerate(zip(pair.examples, names, strict=True))
    ]
    if is_mixed:
        rows.insert(1, _input_row(pair, run))
    title = f"{'Pair' if is_mixed else 'Input'} {number + 1}"
    return element("article", element("h3", title), element("div", rows, class_="rows"), class_="pair")


def _image_row(example: Example, name: str, has_other: bool, run: Run) -> Html:
    shown = [(0, "view 1")] + ([(1, "view 2")] if has_other else [])
    outlines = [_outline(example, which) for which, _ in shown]
    label = example.caption or example.category or ", ".join(example.tags or ()) or "without label"
    whole = outlined(example.image, f"{name}, {label}, with its crop boxes", outlines)
    parts = [figure(whole, element("b", name))]
    for which, title in shown:
        flipped = " flipped" if example.boxes[which, 4] else ""
        alt = f"{title} of {name}{flipped}: the crop after colour changes"
        view = pixels(_pixels(example.views[which]), alt)
        parts.append(figure(view, [_swatch(which), f"{title}{' ⇄' if flipped else ''}"]))
    if has_other:
        target = tinted_view(
            _pixels(example.views[1]), run.grid, f"view 2 of {name}, each patch in its own colour"
        )
        parts.append(figure(target, "patches of view 2"))
        lands = landing(
            example.image,
            example.boxes[0],
            example.boxes[1],
            run.grid,
            f"the same patches around view 1 of {name}",
        )
        parts.append(figure(lands, "where they lie around view 1"))
    return element(
        "div", _label(name, example), element("div", parts, class_="strip"), class_=f"row of-{len(parts)}"
    )


def _label(name: str, example: Example) -> Html:
    said: Child
    if example.caption is not None:
        said = [element("span", "text", class_="tag text"), element("q", example.caption)]
    elif example.category is not None:
        said = [element("span", "category", class_="tag category"), example.category]
    elif example.tags is not None:
        said = [element("span", "tags", class_="tag category"), ", ".join(example.tags) or "none is sure"]
    else:
        said = "no label"
    origin = element("span", f"{example.source}/{example.key}", class_="origin")
    return element("p", element("b", f"{name}: "), said, " ", origin, class_="label")


def _input_row(pair: Pair, run: Run) -> Html:
    patch = run.mask.patch
    is_second = np.kron(pair.mask, np.ones((patch, patch), dtype=bool))[..., None]
    first, second = (_pixels(example.views[0]) for example in pair.examples)
    mixed = np.where(is_second, second, first)
    share = f"{100 * pair.mask.mean():.0f} %"
    parts = [
        figure(
            mask_picture(pair.mask, f"mask: {share} of the patches show image j"), f"mask: {share} show j"
        ),
        figure(pixels(mixed, "the mixed input that the backbone sees"), "mixed input"),
    ]
    return element(
        "div",
        element("p", element("b", "the input: "), "visible part of i, hidden part from j", class_="label"),
        element("div", parts, class_="strip"),
        class_="row input of-2",
    )


def _outline(example: Example, which: int) -> Outline:
    """The crop box on the whole image as it is stored: boxes of flipped views are mirrored back."""
    top, left, height, width, is_flipped = example.boxes[which].tolist()
    if is_flipped:
        left = example.image.shape[1] - left - width
    return Outline(left, top, width, height, VIEW_COLOURS[which], is_dashed=which == 1)


def _swatch(which: int) -> Html:
    return element("i", class_=f"swatch view{which + 1}")


def _pixels(view: UInt8[Tensor, "3 s s"]) -> UInt8[np.ndarray, "s s 3"]:
    return np.ascontiguousarray(view.permute(1, 2, 0).numpy())


def legend(run: Run) -> Html:
    """Which outline belongs to which view."""
    targets = run.objective.targets.items()
    same = ", ".join(name for name, target in targets if target.kind not in LABELS and target.view == "same")
    other = ", ".join(name for name, target in targets if target.view == "other")
    items = [("swatch view1", f"view 1: the input{f', and the target of {same}' if same else ''}")]
    if run.objective.input.views == 2:
        items.append(
            ("swatch view2", "view 2: an input as well, each view with the other in the place of view 2")
        )
    elif other:
        items.append(("swatch view2", f"view 2: the target of {other}"))
    return key(*items, ("", "⇄ flipped"))
