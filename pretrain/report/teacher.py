"""Which pictures show what the teacher learned? Neighbours, finds of captions, components, gazes, best names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from pretrain.report import gaze
from pretrain.report.looks import Found, Look, Shown, asked
from pretrain.visualize.features import principal_rgb
from pretrain.visualize.markup import Child, Html, element, figure
from pretrain.visualize.picture import photo, pixels

NUM_NEIGHBOURS = 5
THUMB = 128  # stored pixels of the longer side
NUM_NAMES = 3  # best class names shown for an image


def when(look: Look) -> str:
    """Name of a checkpoint in captions."""
    return "before training" if look.step == 0 else f"after {look.step:,} steps"


def neighbours(heldout: Shown, train: Shown, looks: Sequence[Look]) -> Html:
    """Each held-out image, then its nearest training images for each checkpoint; right categories are marked."""
    rows = []
    for place in range(len(heldout.views)):
        wanted = heldout.name(place)
        query = figure(
            _photo(heldout.views[place], f"held-out image, {wanted or 'no category'}"), wanted or "", "query"
        )

        def shown(candidate: int, cosine: float, wanted: str | None = wanted) -> Html:
            name = train.name(candidate)
            mark = None if wanted is None or name is None else name == wanted
            alt = f"training image, {name or 'no category'}, cosine {cosine:.2f}"
            return figure(_photo(train.views[candidate], alt), _marked(name, mark), _class(mark))

        found = [_found(look, look.neighbours, place, shown) for look in looks]
        rows.append(element("div", query, found, class_="neighbours"))
    return _gallery("held-out", rows, looks)


def by_caption(heldout: Shown, gallery: Shown, looks: Sequence[Look]) -> Html | None:
    """Each caption, then the held-out images nearest to it for each checkpoint; images of that caption are marked.

    None where no checkpoint can tell.
    """
    if any(look.by_caption is None for look in looks):
        return None
    rows = []
    for place, text in enumerate(asked(heldout)):

        def shown(candidate: int, cosine: float, text: str = text) -> Html:
            mark, told = text in gallery.captions[candidate], gallery.name(candidate)
            alt = f"held-out image, {told or 'no category'}, cosine {cosine:.2f}"
            return figure(_photo(gallery.views[candidate], alt), _marked(told, mark), _class(mark))

        found = [_found(look, look.by_caption, place, shown) for look in looks if look.by_caption]
        rows.append(element("div", element("div", text, class_="query"), found, class_="neighbours asked"))
    return _gallery("caption", rows, looks, "asked")


def share_found_by_caption(heldout: Shown, gallery: Shown, look: Look) -> float:
    """Share of the captions that find an image of theirs among those that are shown."""
    texts = asked(heldout)
    places = look.by_caption.places.tolist() if look.by_caption else []
    right = [
        any(text in gallery.captions[candidate] for candidate in found)
        for text, found in zip(texts, places, strict=True)
    ]
    return sum(right) / len(right)


def _gallery(queries: str, rows: Sequence[Html], looks: Sequence[Look], kind: str = "") -> Html:
    titles = [element("span", when(look)) for look in looks]
    head = element("div", element("span", queries), titles, class_=f"neighbours head {kind}".rstrip())
    return element("div", head, rows, class_=f"table-like columns-{len(looks)}")


def share_of_right_neighbours(heldout: Shown, train: Shown, look: Look) -> float:
    """Share of the shown neighbours that are of the query's category."""
    right = [
        train.name(int(candidate)) == heldout.name(place)
        for place in range(len(heldout.views))
        for candidate in look.neighbours.places[place]
    ]
    return sum(right) / len(right)


def _found(look: Look, found: Found, query: int, shown: Callable[[int, float], Html]) -> Html:
    """What one checkpoint finds for a query; `shown` pictures one image with its cosine."""
    pairs = zip(found.places[query].tolist(), found.similarity[query].tolist(), strict=True)
    pictures = element("div", [shown(*pair) for pair in pairs], class_="thumbs")
    return element("div", element("span", when(look), class_="small-screen"), pictures)


def _class(mark: bool | None) -> str:
    return {True: "right", False: "wrong", None: ""}[mark]


def _marked(name: str | None, mark: bool | None) -> Child:
    sign = {True: "✓ ", False: "✗ ", None: ""}[mark]
    return [element("b", sign), name or ""]


def components(heldout: Shown, looks: Sequence[Look]) -> Html:
    """Images above their token features as colours, one row of colours a checkpoint."""
    return _grids(heldout, {when(look): list(principal_rgb(look.tokens)) for look in looks}, "token features")


def gazes(heldout: Shown, looks: Sequence[Look]) -> Html | None:
    """Images above the places that their middle draws from, one row a checkpoint; None where nothing was seen."""
    if any(look.gaze is None for look in looks):
        return None
    pictures = {when(look): [gaze.picture(shares) for shares in look.gaze] for look in looks}
    return _grids(heldout, pictures, "where the middle looks")


def _grids(heldout: Shown, grids: Mapping[str, Sequence[np.ndarray]], what: str) -> Html:
    columns = []
    for place in range(len(heldout.views)):
        name = heldout.name(place) or "image"
        parts = [_photo(heldout.views[place], name)]
        parts += [pixels(grid[place], f"{what} of {name}, {title}") for title, grid in grids.items()]
        columns.append(element("div", parts, element("span", heldout.name(place) or ""), class_="column"))
    names = element(
        "div", element("span", "image"), [element("span", t) for t in grids], class_="column names"
    )
    return element("div", names, columns, class_=f"components rows-{len(grids)}", tabindex="0")


def zero_shot(heldout: Shown, looks: Sequence[Look]) -> Html | None:
    """The best class names of each image by the newest checkpoint; None when there are no name scores."""
    names = looks[-1].names
    if names is None:
        return None
    top = max(float(scores.max()) for scores in names.values())
    cards = []
    for place in range(len(heldout.views)):
        wanted = heldout.name(place)
        cosines = {name: float(scores[place]) for name, scores in names.items()}
        low = min(cosines.values())
        span = max(top - low, 1e-6)
        best = sorted(cosines, key=lambda name: -cosines[name])[:NUM_NAMES]
        bars = [_bar(name, cosines[name], (cosines[name] - low) / span, name == wanted) for name in best]
        picture = figure(_photo(heldout.views[place], f"held-out image, {wanted}"), wanted or "")
        cards.append(element("div", picture, element("ol", bars), class_="guess"))
    return element("div", cards, class_="guesses")


def _bar(name: str, cosine: float, share: float, is_right: bool) -> Html:
    return element(
        "li",
        element("span", "✓ " if is_right else "", name, class_="name"),
        element("span", f"{cosine:.3f}".replace("-", "−"), class_="score"),
        element("span", element("i", style=f"width:{100 * max(share, 0.02):.0f}%"), class_="bar"),
        class_="right" if is_right else None,
    )


def _photo(view: Tensor, alt: str) -> Html:
    return photo(np.ascontiguousarray(view.permute(1, 2, 0).numpy()), alt, THUMB)
