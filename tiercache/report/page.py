"""The page: sections of figures, each with its exact numbers. It is whole in itself and asks the network for nothing."""

import base64
import hashlib
from pathlib import Path

from tiercache.report import sections
from tiercache.report.facts import Facts
from tiercache.report.header import header
from tiercache.report.html import Html, tag

_HERE = Path(__file__).parent


def page(facts: Facts) -> Html:
    """The HTML behind the file's first lines."""
    style, script = (_code(name) for name in ("style.css", "tips.js"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content="tiercache"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"Replay of {facts.subject.title}"),
        tag("style", style),
    )
    parts = (
        sections.size_curves(facts),
        sections.choices(facts),
        sections.served(facts),
        sections.reads(facts),
        sections.latency(facts),
        sections.working_set(facts),
        sections.about(facts),
    )
    body = tag("body", tag("main", header(facts), sections.results(facts), *parts), tag("script", script))
    return tag("html", head, body, lang="en")


def _code(name: str) -> Html:
    """A file of the package, which is as it stands in the page."""
    return Html((_HERE / name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> str:
    """What a browser may run and load: these two, and nothing from anywhere else."""
    sums = (base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in (style, script))
    return "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; img-src data:".format(*sums)


