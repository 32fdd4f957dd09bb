"""Which sentences stand for a class name in zero-shot classification, and what is the name?

ImageNet's names and templates are those of CLIP (arXiv 2103.00020, section 3.1.4), as open_clip keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from data_prep.labels import fill_prompt

AUTO = "auto"  # IMAGENET where the data set has its classes, else PLAIN
PLAIN, IMAGENET = "plain", "imagenet"
SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Template:
    text: str  # with {} for the name, as it is told
    fill: Callable[[str], str]  # name -> sentence


def _prompt(text: str) -> Template:
    return Template(text, partial(fill_prompt, text))


def _of_open_clip(name: str) -> tuple[Template, ...]:
    import open_clip  # takes seconds, which other data sets do not pay

    return tuple(Template(fill("{}"), fill) for fill in getattr(open_clip, name))


# The first two are CLIP's simplest (arXiv 2103.00020, section 3.1.4);
# the others are how people, and the captions of the embedded scenes, open a description.
PROMPTS = tuple(
    map(
        _prompt,
        (
            "a photo of {}.",
            "{}.",
            "a picture of {}",
            "an image of {}",
            "a view of {}",
            "a snapshot of {}",
            "here is {}",
            "there is {}",
            "{}",
        ),
    )
)
TEMPLATES: dict[str, Callable[[], tuple[Template, ...]]] = {
    PLAIN: lambda: PROMPTS,
    IMAGENET: lambda: _of_open_clip("OPENAI_IMAGENET_TEMPLATES"),
    "imagenet_simple": lambda: _of_open_clip("SIMPLE_IMAGENET_TEMPLATES"),
}
IMAGENET_CLASSES = 1000


def choose_templates(
    name: str, categories: Sequence[str]
) -> tuple[str, tuple[Template, ...], tuple[str, ...]]:
    """Name of the templates, the templates, and the names that they are filled with, in the order of the categories.

    Of ImageNet-1k's classes, which synset numbers or open_clip's names tell in any order, the names are open_clip's.
    Raises ValueError for an unknown name.
    """
    check_templates(name)
    names = imagenet_names(categories)
    if name == AUTO:
        name = PLAIN if names is None else IMAGENET
    return name, TEMPLATES[name](), names or tuple(categories)


def check_templates(name: str) -> None:
    """ValueError for an unknown name."""
    if name not in (AUTO, *TEMPLATES):
        raise ValueError(f"--templates {name!r} is unknown; choose from {[AUTO, *TEMPLATES]}")


def imagenet_names(categories: Sequence[str]) -> tuple[str, ...] | None:
    """open_clip's names of ImageNet-1k's classes in the order of the categories; None for any other data set."""
    if len(categories) != IMAGENET_CLASSES:
        return None
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    of_synset = dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))
    found = [SYNSET.match(category) for category in categories]
    if all(found):
        names = [of_synset.get(match[0]) for match in found]
    else:
        known = {_plain(name): name for name in IMAGENET_CLASSNAMES}
        names = [known.get(_plain(category)) for category in categories]
    return tuple(names) if None not in names and len(set(names)) == len(set(IMAGENET_CLASSNAMES)) else None


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
