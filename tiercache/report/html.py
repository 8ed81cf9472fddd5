"""HTML and SVG as text. Whatever is not `Html` is escaped, so that names from outside stay names."""

import re
from collections.abc import Iterable, Sequence
from html import escape

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_VOID = {"meta", "link"}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Html:
    """A value as HTML that shows it."""
    return value if isinstance(value, Html) else Html(escape(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", str(value))))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. An attribute's name may end with an underscore, and has dashes for the others; None leaves it out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items() if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """One after the other."""
    return Html("".join(map(text, parts)))


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], *, id_: str) -> Html:
    """A table whose first column names the row; it scrolls within itself where there is no room."""
    columns = tag("tr", *(tag("th", name, scope="col") for name in head))
    body = (tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows)
    inner = tag("table", tag("thead", columns), tag("tbody", *body), id=id_, aria_labelledby=f"{id_}-caption")
    box = tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)
    return join((tag("p", caption, id=f"{id_}-caption", class_="caption"), box))
