"""Drawing in SVG: a plot with two axes, and labels beside lines. Colours are classes of style.css, and so follow the theme.

Every figure is drawn twice, for a screen and for a phone, each in its own units; style.css shows one of them. Lengths are the
pixels of that drawing.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from tiercache.report.html import Html, join, tag

Point = tuple[float, float]


class Size(NamedTuple):
    """One of the two drawings of a figure."""

    name: str
    width: int

    @property
    def is_wide(self) -> bool:
        """Whether it is the screen's."""
        return self.name == "wide"


SIZES = (Size("wide", 760), Size("narrow", 358))
"""Both. A column of the page is 760 px wide at most, a phone's 358 or so."""

_LETTER = 8.0
"""Width of a letter of 13 px, about, in a wide font; fonts are the reader's."""


def text_width(text: str) -> float:
    """How wide a label may be."""
    return _LETTER * len(text)


class Scale(NamedTuple):
    """From values to pixels, linear or logarithmic."""

    first: float
    last: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.first, self.last, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        share = (at - low) / (high - low) if high > low else 0.5
        return round(self.begin + share * (self.end - self.begin), 1)


class Tick(NamedTuple):
    """A value of an axis and its label."""

    at: float
    label: str


class Plot:
    """Axes of a drawing, and what is drawn between them. y: from the bottom up."""

    def __init__(
        self, size: Size, height: float, x: tuple[float, float, bool], y: tuple[float, float], *, right: float, top: float = 34
    ) -> None:
        self.size, self.height = size, height
        self.left, self.right, self.top, self.bottom = 46.0, size.width - right, top, height - 46
        self.x = Scale(x[0], x[1], self.left, self.right, x[2])
        self.y = Scale(y[0], y[1], self.bottom, self.top)
        self.parts: list[Html] = []

    def axes(self, x_ticks: Sequence[Tick], y_ticks: Sequence[Tick], x_title: str, y_title: str) -> None:
        """Grid lines, labels and titles. Of the labels of x those that would touch the one before are left out."""
        for value, label in y_ticks:
            at = self.y(value)
            kind = "axis" if value == self.y.first else "grid"
            self.parts.append(tag("line", class_=kind, x1=self.left, x2=self.right, y1=at, y2=at))
            self.parts.append(label_at(self.left - 8, at + 4, label, "tick", "end"))
        free = -math.inf
        for value, label in x_ticks:
            at, half = self.x(value), text_width(label) / 2
            self.parts.append(tag("line", class_="axis", x1=at, x2=at, y1=self.bottom, y2=self.bottom + 5))
            if at - half >= free:
                shown = min(at, self.size.width - half)
                self.parts.append(label_at(shown, self.bottom + 20, label, "tick", "middle"))
                free = at + half + 8
        self.parts.append(label_at(0, 13, y_title, "title", "start"))
        self.parts.append(label_at(self.right, self.height - 6, x_title, "title", "end"))

    def line(self, points: Sequence[Point], kind: str) -> None:
        """A line through values."""
        path = " ".join(f"{self.x(x):g},{self.y(y):g}" for x, y in points)
        self.parts.append(tag("polyline", class_=f"line {kind}", points=path))

    def dot(self, x: float, y: float, kind: str) -> None:
        """A filled circle."""
        self.parts.append(tag("circle", class_=f"dot {kind}", cx=self.x(x), cy=self.y(y), r=4.5))

    def uprights(self, labels: Sequence[tuple[float, str]]) -> None:
        """Vertical lines, each with its label at its top, above the plot in two rows; left out where both are taken."""
        taken: list[list[tuple[float, float]]] = [[], []]
        for value, label in labels:
            at, width = self.x(value), text_width(label) + 12
            spans = [(at, at + width)] if at + width <= self.right + 4 else [(at - width, at)]
            free = [
                (row, begin, end)
                for begin, end in spans
                for row in (0, 1)
                if begin > -8 and all(end <= a or begin >= b for a, b in taken[row])
            ]
            top = self.top
            if free:
                row, begin, end = free[0]
                taken[row].append((begin, end))
                top += -12 - 16 * (1 - row)
                where = (at + 5, "start") if begin == at else (at - 5, "end")
                self.parts.append(label_at(where[0], top + 11, label, "mark-label", where[1]))
            self.parts.append(tag("line", class_="mark", x1=at, x2=at, y1=top, y2=self.bottom))

    def level(self, y: float, label: str) -> None:
        """A horizontal line with its label above it, at the right."""
        at = self.y(y)
        self.parts.append(tag("line", class_="mark", x1=self.left, x2=self.right, y1=at, y2=at))
        self.parts.append(label_at(self.right, at - 5, label, "mark-label", "end"))

    def bar(self, x: float, width: float, low: float, high: float, kind: str) -> None:
        """A bar from `low` up to `high`; x, width: pixels."""
        bottom, top = self.y(low), self.y(high)
        if bottom > top:
            self.parts.append(tag("rect", class_=kind, x=f"{x:g}", y=top, width=f"{width:g}", height=f"{bottom - top:g}"))

    def beside(self, labels: Sequence[tuple[float, str, str]]) -> None:
        """Names right of lines that end at these values: (value, name, class). They are moved apart, and lead to their ends."""
        wanted = [self.y(value) for value, _, _ in labels]
        for (value, name, kind), at in zip(labels, spread(wanted, 16, self.top, self.bottom), strict=True):
            end = self.y(value)
            if abs(end - at) > 2:
                path = f"M{self.right + 2:g},{end:g} L{self.right + 10:g},{at:g}"
                self.parts.append(tag("path", class_=f"lead {kind}", d=path))
            self.parts.append(label_at(self.right + 13, at + 4, name, f"name {kind}", "start"))

    def tips(self, edges: Sequence[tuple[float, float]], tips: Sequence[str]) -> None:
        """What is told where a pointer is: a text for each strip between two pixels."""
        for (begin, end), tip in zip(edges, tips, strict=True):
            self.parts.append(
                tag(
                    "rect", tag("title", tip), class_="tip", x=f"{begin:g}", y=self.top, width=f"{max(end - begin, 0.5):g}",
                    height=f"{self.bottom - self.top:g}",
                )
            )  # fmt: skip

    def svg(self, label: str) -> Html:
        """The drawing."""
        return svg(self.size, self.height, self.parts, label)


def svg(size: Size, height: float, parts: Sequence[Html], label: str) -> Html:
    """A drawing of these parts; label: what a reader who does not see it should know."""
    box = f"0 0 {size.width} {height:g}"
    return tag("svg", join(parts), class_=size.name, viewBox=box, role="img", aria_label=label)


def label_at(x: float, y: float, label: str, kind: str, anchor: str) -> Html:
    """Text; anchor: which end of it is at x."""
    return tag("text", label, class_=kind, x=f"{x:g}", y=f"{y:g}", text_anchor=anchor)


def spread(wanted: Sequence[float], apart: float, top: float, bottom: float) -> list[float]:
    """Places as near as may be to the wanted ones, `apart` at least, in their order from the top; between top and bottom
    as far as there is room."""
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    clusters: list[tuple[float, list[int]]] = []
    for number in order:
        members = [number]
        while True:
            height = apart * (len(members) - 1)
            middle = sum(wanted[each] for each in members) / len(members)
            begin = max(top, min(middle - height / 2, bottom - height))
            if not clusters or clusters[-1][0] + apart * len(clusters[-1][1]) <= begin:
                break
            members = clusters.pop()[1] + members
        clusters.append((begin, members))
    places = [0.0] * len(wanted)
    for begin, members in clusters:
        for place, number in enumerate(members):
            places[number] = round(begin + apart * place, 1)
    return places


def strips(centres: Sequence[float]) -> list[tuple[float, float]]:
    """The strip around each of these ascending pixels, up to halfway to its neighbours."""
    halves = [(a + b) / 2 for a, b in pairwise(centres)]
    return list(zip([centres[0], *halves], [*halves, centres[-1]], strict=True))


def even_ticks(most: float, label: Callable[[float], str], wanted: int = 5) -> list[Tick]:
    """Ticks from 0 on at 1, 2 or 5 times a power of ten; the last is at or above `most`."""
    step = 10 ** math.floor(math.log10(max(most, 1e-12) / wanted))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if most / (step * factor) <= wanted)
    return [Tick(number * step, label(number * step)) for number in range(math.ceil(most / step - 1e-9) + 1)]


def power_ticks(first: float, last: float, base: int, label: Callable[[float], str], wanted: int) -> list[Tick]:
    """Ticks of a logarithmic axis at powers of a base, or at each second, third and so on, to be at most `wanted`."""
    powers = range(math.ceil(math.log(first, base) - 1e-9), math.floor(math.log(last, base) + 1e-9) + 1)
    step = max(1, -(-len(powers) // wanted))
    return [Tick(float(base) ** power, label(float(base) ** power)) for power in powers[::step]]
