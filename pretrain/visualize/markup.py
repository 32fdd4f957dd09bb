"""How does text become HTML without ever becoming markup by accident? Everything that is not Html is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

VOID = {"img", "br", "meta", "hr", "col"}  # HTML elements without an end tag


@dataclass(frozen=True)
class Html:
    """Markup that may stand in a page as it is. Only `element` and fixed text of this package make it."""

    text: str


Child = Any  # Html, str, int, float, None, or an iterable of these, nested as deep as one likes


def element(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """`<name attributes>children</name>`; strings are escaped, None is left out, iterables are flattened.

    A trailing underscore of an attribute falls away (`class_`), inner ones become hyphens (`stroke_width`). An
    attribute that is None or False is left out, one that is True stands without value.
    """
    head = name + "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{head}>")
    return Html(f"<{head}>{join(children).text}</{name}>")


def join(children: Child) -> Html:
    """One piece of markup from nested pieces, strings escaped."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str | int | float):
        return Html(escape(str(children)))
    return Html("".join(join(child).text for child in children))


def _attribute(key: str, value: str | float | bool | None) -> str:
    key = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    if value is True:
        return f" {key}"
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return f' {key}="{escape(text)}"'


def figure(content: Child, caption: Child, class_: str = "") -> Html:
    """A picture with its caption below."""
    return element("figure", content, element("figcaption", caption), class_=class_ or None)


def key(*items: tuple[str, str]) -> Html:
    """A legend: (class of a sign, what it stands for); an item with class "" has no sign."""
    return element(
        "p",
        [element("span", element("i", class_=sign) if sign else None, " ", text) for sign, text in items],
        class_="legend",
    )


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], class_: str = "") -> Html:
    """A table whose first column names the row; wide ones scroll inside their frame."""
    body = [
        element(
            "tr",
            [
                element("th", cell, scope="row") if column == 0 else element("td", cell)
                for column, cell in enumerate(row)
            ],
        )
        for row in rows
    ]
    header = element("thead", element("tr", [element("th", cell, scope="col") for cell in head]))
    content = element("table", header, element("tbody", body), class_=class_ or None)
    return element("div", content, class_="scroll", tabindex="0")
