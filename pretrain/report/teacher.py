"""Which pictures show what the teacher learned? Neighbours, principal components, gazes and best class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from pretrain.report import gaze
from pretrain.report.looks import Look, Shown
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
        name = heldout.name(place)
        query = figure(
            _photo(heldout.views[place], f"held-out image, {name or 'no category'}"), name or "", "query"
        )
        found = [_found(heldout, train, look, place) for look in looks]
        rows.append(element("div", query, found, class_="neighbours"))
    head = element(
        "div",
        element("span", "held-out"),
        [element("span", when(lk)) for lk in looks],
        class_="neighbours head",
    )
    return element("div", head, rows, class_=f"table-like columns-{len(looks)}")


def share_of_right_neighbours(heldout: Shown, train: Shown, look: Look) -> float:
    """Share of the shown neighbours that are of the query's category."""
    right = [
        train.name(int(candidate)) == heldout.name(place)
        for place in range(len(heldout.views))
        for candidate in look.neighbours[place]
    ]
    return sum(right) / len(right)


def _found(heldout: Shown, train: Shown, look: Look, place: int) -> Html:
    wanted = heldout.name(place)
    parts = []
    for candidate, cosine in zip(
        look.neighbours[place].tolist(), look.similarity[place].tolist(), strict=True
    ):
        name = train.name(candidate)
        mark = None if wanted is None or name is None else name == wanted
        alt = f"training image, {name or 'no category'}, cosine {cosine:.2f}"
        parts.append(figure(_photo(train.views[candidate], alt), _marked(name, mark), _class(mark)))
    label = element("span", when(look), class_="small-screen")
    return element("div", label, element("div", parts, class_="thumbs"))


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
