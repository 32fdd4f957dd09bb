"""How do sections become one HTML file that needs nothing beside it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.visualize.markup import Child, Html, element, join

STYLE = Path(__file__).with_name("style.css")


@dataclass(frozen=True)
class Section:
    """One part of the page: its anchor, its title, its content, and a sentence below the title."""

    id: str
    title: str
    content: Html
    lead: Child = None


def document(
    title: str, head: Child, sections: Sequence[Section], short: Mapping[str, str] | None = None
) -> str:
    """The whole file as text: `head`, then the sections, and links to them, by id with a `short` title."""
    names = short or {}
    links = [element("a", names.get(one.id, one.title), href=f"#{one.id}") for one in sections]
    body = [
        element(
            "section",
            element("h2", section.title),
            element("p", section.lead, class_="lead") if section.lead else None,
            section.content,
            id=section.id,
        )
        for section in sections
    ]
    preamble = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(STYLE.read_text(encoding="utf-8"))),
    )
    nav = element("nav", links, aria_label="Sections")
    page = element("html", preamble, element("body", nav, element("main", head, body)), lang="en")
    return join([Html("<!doctype html>\n"), page]).text
