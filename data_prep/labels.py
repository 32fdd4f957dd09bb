"""What do the tags and the category of a sample say? Standard library only, as `schema.py`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def tags_of(record: Any, vocabulary: Collection[str]) -> list[tuple[str, float]]:
    """Names and confidences of the tags in a sample's decoded .json, as they stand there.

    Raises ValueError for anything but a list of [name of the vocabulary, confidence in [0, 1]].
    """
    tags = record.get("tags") if isinstance(record, dict) else None
    if not isinstance(tags, list):
        raise ValueError(f"tags={tags!r} must be a list, of a name and a confidence each")
    for tag in tags:
        match tag:
            case [str(name), int(confidence) | float(confidence)] if not isinstance(confidence, bool):
                is_good = name in vocabulary and 0 <= confidence <= 1
            case _:
                is_good = False
        if not is_good:
            raise ValueError(
                f"tag {tag!r} must be one of the {len(vocabulary)} names of the manifest's tags and a confidence in "
                "[0, 1]"
            )
    return [(name, float(confidence)) for name, confidence in tags]


def fill_prompt(prompt: str, category: str) -> str:
    """What a caption says of a category: {} in the prompt becomes its name with its article.

    Underscores and hyphens separate words: ("a photo of {}.", "paper_plane") -> "a photo of a paper plane."
    """
    words = " ".join(category.replace("_", " ").replace("-", " ").split())
    is_vowel = words[:1].lower() in tuple("aeiou") or words.lower().startswith("hour")
    return prompt.replace("{}", f"{'an' if is_vowel else 'a'} {words}")
