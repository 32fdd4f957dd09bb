"""How is a scene told in words? A small grammar that says true things in varied wording.

Every word that stands for a fact comes from a table here, so that a caption can be read back and checked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_prep.sources.layout import Facts, Seen

KIND_WORDS: dict[str, tuple[str, ...]] = {  # other names of a kind; each holds the kind as its last word
    "arrow": ("arrow",),
    "bolt": ("bolt", "lightning bolt"),
    "boat": ("boat", "sailing boat"),
    "bottle": ("bottle", "glass bottle"),
    "mug": ("mug", "coffee mug"),
    "tree": ("tree", "fir tree"),
    "anchor": ("anchor", "ship anchor"),
}
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big", "huge"),
}
TEXTURE_WORDS = {  # before the noun
    "plain": ("plain",),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checked": ("checked", "checkered"),
    "shaded": ("shaded",),
    "speckled": ("speckled", "flecked"),
}
TEXTURE_TAILS = {  # after the noun
    "plain": ("without a pattern",),
    "striped": ("with stripes",),
    "dotted": ("with dots", "with spots"),
    "checked": ("with a checked pattern",),
    "shaded": ("fading from dark to light",),
    "speckled": ("with speckles",),
}
COLOR_WORDS = {"gray": ("gray", "grey"), "purple": ("purple", "violet")}  # the others have one name
RELATION_WORDS = {
    "left of": ("to the left of", "left of", "on the left side of"),
    "right of": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than", "beneath"),
    "behind": ("behind", "partly hidden by"),
    "in front of": ("in front of", "partly hiding"),
    "next to": ("next to", "beside", "near"),
}
GROUND_WORDS = {
    "wood": ("on wooden boards", "on a wooden table"),
    "grass": ("on the grass", "in a meadow"),
    "sand": ("on sand", "on a beach"),
    "brick": ("on a brick wall", "before bricks"),
    "fabric": ("on a cloth", "on woven fabric"),
    "stone": ("on stone", "on a rock"),
    "water": ("on water", "over the water"),
    "plaster": ("on a plaster wall", "before a painted wall"),
}
OPENERS = ("a photo of", "a picture of", "an image of", "a snapshot of", "a view of", "here is", "there is")


def captions(rng: np.random.Generator, facts: Facts, count: int) -> tuple[str, ...]:
    """`count` different captions of a scene; each names the salient object, which is facts.objects[0]."""
    told: dict[str, str] = {}
    while len(told) < count:
        patterns = [pattern for pattern, needed in PATTERNS.items() if len(facts.objects) >= needed]
        text = " ".join(patterns[int(rng.integers(len(patterns)))](rng, facts).split()).replace(" ,", ",")
        is_sentence = rng.random() < 0.5
        told.setdefault(text, text[0].upper() + text[1:] + "." if is_sentence else text)
    return tuple(told.values())


def _choose(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _noun(rng: np.random.Generator, seen: Seen, detail: float = 0.5) -> str:
    """An object with some of its attributes: "a small striped red fish"; each is named with probability `detail`."""
    words = []
    if rng.random() < detail:
        words.append(_choose(rng, SIZE_WORDS[seen.size]))
    has_texture, is_tail = rng.random() < detail, rng.random() < 0.35
    if has_texture and not is_tail:
        words.append(_choose(rng, TEXTURE_WORDS[seen.texture]))
    if rng.random() < 0.5 + detail / 2:
        words.append(_choose(rng, COLOR_WORDS.get(seen.color, (seen.color,))))
    words.append(_choose(rng, KIND_WORDS.get(seen.kind, (seen.kind,))))
    if has_texture and is_tail:
        words.append(_choose(rng, TEXTURE_TAILS[seen.texture]))
    return with_article(" ".join(words))


def with_article(words: str) -> str:
    """ "a star", "an arrow", "an hourglass"."""
    return f"{'an' if words[0] in 'aeiou' or words.startswith('hour') else 'a'} {words}"


def _ground(rng: np.random.Generator, facts: Facts, chance: float = 0.6) -> str:
    return _choose(rng, GROUND_WORDS[facts.background]) if rng.random() < chance else ""


def _relation(rng: np.random.Generator, facts: Facts) -> tuple[Seen, str, Seen] | None:
    """A true relation that involves the salient object."""
    known = [relation for relation in facts.relations if 0 in (relation[0], relation[2])]
    if not known:
        return None
    first, name, second = known[int(rng.integers(len(known)))]
    return facts.objects[first], _choose(rng, RELATION_WORDS[name]), facts.objects[second]


def _one(rng: np.random.Generator, facts: Facts) -> str:
    return f"{_choose(rng, OPENERS)} {_noun(rng, facts.objects[0])} {_ground(rng, facts)}"


def _bare(rng: np.random.Generator, facts: Facts) -> str:
    return f"{_noun(rng, facts.objects[0], 0.8)} {_ground(rng, facts)}"


def _class(rng: np.random.Generator, facts: Facts) -> str:
    return f"{_choose(rng, OPENERS)} {with_article(facts.objects[0].kind)} {_ground(rng, facts, 0.3)}"


def _colored(rng: np.random.Generator, facts: Facts) -> str:
    seen = facts.objects[0]
    color = _choose(rng, COLOR_WORDS.get(seen.color, (seen.color,)))
    return f"the {seen.kind} is {color} and {_choose(rng, SIZE_WORDS[seen.size])}"


def _listed(rng: np.random.Generator, facts: Facts) -> str:
    nouns = [_noun(rng, seen, 0.3) for seen in facts.objects]
    return f"{_choose(rng, OPENERS)} {', '.join(nouns[:-1])} and {nouns[-1]} {_ground(rng, facts, 0.4)}"


def _related(rng: np.random.Generator, facts: Facts) -> str:
    relation = _relation(rng, facts)
    if relation is None:
        return _listed(rng, facts)
    first, words, second = relation
    opener = _choose(rng, ("", "", *OPENERS))
    verb = "" if opener else _choose(rng, ("", "is"))
    return f"{opener} {_noun(rng, first)} {verb} {words} {_noun(rng, second)} {_ground(rng, facts, 0.3)}"


def _staged(rng: np.random.Generator, facts: Facts) -> str:
    relation = _relation(rng, facts)
    if relation is None:
        return _bare(rng, facts)
    first, words, second = relation
    told = f"{_noun(rng, first, 0.6)} and {_noun(rng, second, 0.6)} {_ground(rng, facts, 0.4)}"
    return f"{told}, the {first.kind} is {words} the {second.kind}"


PATTERNS: dict[Callable[[np.random.Generator, Facts], str], int] = {  # pattern -> objects that it needs
    _one: 1,
    _bare: 1,
    _class: 1,
    _colored: 1,
    _listed: 2,
    _related: 2,
    _staged: 2,
}
