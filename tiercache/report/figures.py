"""The figures of a page: each as its two drawings, with a sentence for whoever does not see them."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tiercache.report import words
from tiercache.report.draw import SIZES, Plot, Size, Tick, even_ticks, label_at, power_ticks, strips, svg, text_width
from tiercache.report.facts import Served, SizeCurve
from tiercache.report.html import Html, join, tag

_COLOURS = ("gittins", "lru", "s3fifo", "arc", "wtinylfu", "lfu", "sieve", "fifo", "static")
"""Policies that have a colour in style.css."""

Draw = Callable[[Size], Html]


def both(draw: Draw) -> Html:
    """The two drawings."""
    return join(draw(size) for size in SIZES)


def kind_of(name: str, *, is_bound: bool) -> str:
    """The class of a line."""
    if is_bound:
        return f"bound {name.lower()}"
    return f"policy {name}" if name in _COLOURS else "policy"


def size_curve(curve: SizeCurve, label: str) -> Html:
    """Hit rate against size, with the chosen sizes."""
    return both(lambda size: _size_curve(size, curve, label))


def _size_curve(size: Size, curve: SizeCurve, label: str) -> Html:
    most = 100 * max(max(line.rates) for line in curve.lines)
    ticks = even_ticks(max(most, 1.0), lambda value: f"{value:g}", 7)
    right = 16 + max(text_width(line.name) for line in curve.lines)
    chosen = sorted({mark.at for mark in curve.marks})
    x = (curve.sizes[0], curve.sizes[-1], True)
    plot = Plot(size, 400 if size.is_wide else 340, x, (0, ticks[-1].at), right=right, top=64)
    x_ticks = power_ticks(x[0], x[1], 2, words.size, 7 if size.is_wide else 3)
    plot.axes(x_ticks, ticks, "tier size (logarithmic)", "hit rate, % of accesses")
    plot.uprights([(curve.sizes[at], words.size(curve.sizes[at])) for at in chosen])
    for line in sorted(curve.lines, key=lambda line: (not line.is_bound, sum(line.rates))):
        points = [(at, 100 * rate) for at, rate in zip(curve.sizes, line.rates, strict=True)]
        plot.line(points, kind_of(line.name, is_bound=line.is_bound))
    ends = sorted(curve.lines, key=lambda line: (line.rates[-1], sum(line.rates)), reverse=True)
    plot.beside([(100 * line.rates[-1], line.name, kind_of(line.name, is_bound=line.is_bound)) for line in ends])
    for mark in curve.marks:
        plot.dot(curve.sizes[mark.at], 100 * mark.rate, kind_of(mark.line, is_bound=False))
    plot.tips(strips([plot.x(each) for each in curve.sizes]), _curve_tips(curve))
    return plot.svg(label)


def _curve_tips(curve: SizeCurve) -> list[str]:
    tips = []
    for at, number in enumerate(curve.sizes):
        named = sorted(((line.rates[at], line.name) for line in curve.lines), key=lambda pair: -pair[0])
        tips.append("\n".join([words.size(number), *(f"{name}  {words.percent(rate)}" for rate, name in named)]))
    return tips


def served(parts: Sequence[Served], label: str) -> Html:
    """Bars of the shares of accesses that each tier served, by kind."""
    return both(lambda size: _served(size, parts, label))


SEGMENTS = ("device tier", "host tier", "tier", "read again", "read the first time")


def segments_of(part: Served) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """(name, accesses of each kind) from the fastest on."""
    return [*part.tiers, (SEGMENTS[3], part.again), (SEGMENTS[4], part.fresh)]


def segment_class(name: str) -> str:
    """The class of a segment."""
    return f"seg-{name.replace(' ', '-')}"


def _served(size: Size, parts: Sequence[Served], label: str) -> Html:
    drawn: list[Html] = []
    top = 0.0
    for part in parts:
        if len(parts) > 1:
            drawn.append(label_at(0, top + 14, part.title, "heading", "start"))
            top += 24
        shares = [(name, np.append(counts.sum(), counts)) for name, counts in segments_of(part)]
        names = ("all", *part.names) if len(part.names) > 1 else part.names
        for number, name in enumerate(names):
            wanted = [(segment, int(counts[number if len(names) > 1 else 0])) for segment, counts in shares]
            drawn += _stack(size, top, name, wanted)
            top += 50
        top += 10
    return svg(size, top - 14, drawn, label)


def _stack(size: Size, top: float, name: str, wanted: Sequence[tuple[str, int]]) -> list[Html]:
    total = sum(number for _, number in wanted)
    drawn = [label_at(0, top + 13, name, "tick strong", "start")]
    drawn.append(label_at(size.width, top + 13, f"{words.short(total)} accesses", "tick", "end"))
    at = 0.0
    for segment, number in wanted:
        width = size.width * number / max(total, 1)
        share = words.percent(number / max(total, 1))
        kind = segment_class(segment)
        if width > 0:
            tip = f"{name}: {segment}\n{words.count(number)} accesses, {share}"
            box = tag("rect", tag("title", tip), class_=f"{kind} tip", x=f"{at:.1f}", y=f"{top + 19:g}",
                      width=f"{width:.1f}", height=22)  # fmt: skip
            drawn.append(box)
        if width > text_width(share) + 8:
            drawn.append(label_at(round(at + 7, 1), top + 34.5, share, f"inside {kind}-text", "start"))
        at += width
    return drawn


def lengths(bars: Sequence[tuple[str, float, str]], label: str) -> Html:
    """Horizontal bars from a common 0: (name, value, what is written behind it)."""
    return both(lambda size: _lengths(size, bars, label))


def _lengths(size: Size, bars: Sequence[tuple[str, float, str]], label: str) -> Html:
    most = max(value for _, value, _ in bars)
    room = size.width - 12 - max(text_width(said) for _, _, said in bars)
    drawn = []
    for number, (name, value, said) in enumerate(bars):
        top, width = 46 * number, round(max(room * value / max(most, 1e-12), 1.5), 1)
        drawn.append(label_at(0, top + 13, name, "tick", "start"))
        drawn.append(tag("rect", class_="length", x=0, y=top + 19, width=width, height=16, rx=1.5))
        drawn.append(label_at(width + 8, top + 31.5, said, "tick strong", "start"))
    return svg(size, 46 * len(bars) - 6, drawn, label)


def window_bars(distinct: npt.NDArray[np.int64], fresh: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], label: str) -> Html:
    """Distinct rows of each window, with those that are new. ends: accesses until the end of each."""
    return both(lambda size: _window_bars(size, distinct, fresh, ends, label))


def _window_bars(
    size: Size, distinct: npt.NDArray[np.int64], fresh: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], label: str
) -> Html:
    ticks = even_ticks(float(distinct.max()), words.short, 4)
    plot = Plot(size, 260, (0, float(ends[-1]), False), (0, ticks[-1].at), right=14)
    _time_axes(plot, float(ends[-1]), ticks, "distinct rows of a window")
    begins = np.append(0, ends[:-1])
    strips_ = [(plot.x(float(a)), plot.x(float(b))) for a, b in zip(begins, ends, strict=True)]
    for (begin, end), rows, new in zip(strips_, distinct.tolist(), fresh.tolist(), strict=True):
        gap = min(1.0, (end - begin) / 4)
        plot.bar(begin, max(end - begin - gap, 0.3), 0, new, "bar-new")
        plot.bar(begin, max(end - begin - gap, 0.3), new, rows, "bar-known")
    tips = [
        f"until access {words.short(end)}\n{words.count(rows)} distinct rows\n{words.count(new)} for the first time"
        for end, rows, new in zip(ends.tolist(), distinct.tolist(), fresh.tolist(), strict=True)
    ]
    plot.tips(strips_, tips)
    return plot.svg(label)


def over_time(
    values: npt.NDArray[np.float64], ends: npt.NDArray[np.int64], y_title: str, label: str, *,
    levels: Sequence[tuple[float, str]] = (), said: Callable[[float], str] = words.short, from_zero: bool = False,
) -> Html:  # fmt: skip
    """A line over the accesses so far. levels: horizontal lines, (value, name). said: a value as a tip says it."""
    return both(lambda size: _over_time(size, values, ends, y_title, label, levels, said, from_zero))


def _over_time(
    size: Size, values: npt.NDArray[np.float64], ends: npt.NDArray[np.int64], y_title: str, label: str,
    levels: Sequence[tuple[float, str]], said: Callable[[float], str], from_zero: bool,
) -> Html:  # fmt: skip
    most = float(max(values.max(), *(value for value, _ in levels), 1e-9)) if levels else float(max(values.max(), 1e-9))
    ticks = even_ticks(most, said)
    plot = Plot(size, 260, (0, float(ends[-1]), False), (0, ticks[-1].at), right=14)
    _time_axes(plot, float(ends[-1]), ticks, y_title)
    for value, name in levels:
        plot.level(value, name)
    points = [(float(at), float(value)) for at, value in zip(ends, values, strict=True)]
    plot.line([(0.0, 0.0), *points] if from_zero else [(0.0, points[0][1]), *points], "main")
    centres = [plot.x(0), *(plot.x(at) for at, _ in points)]
    tips = [f"until access {words.short(at)}\n{said(value)}" for at, value in points]
    plot.tips(list(pairwise(centres)), tips)
    return plot.svg(label)


def _time_axes(plot: Plot, last: float, ticks: Sequence[Tick], y_title: str) -> None:
    x_ticks = [tick for tick in even_ticks(last, words.short, 6 if plot.size.is_wide else 3) if tick.at <= last]
    plot.axes(x_ticks, ticks, "accesses so far", y_title)


def latencies(latency_ns: npt.NDArray[np.int64], marks: Sequence[tuple[str, float]], label: str) -> Html:
    """A histogram of times on a logarithmic axis. marks: (name, ns)."""
    return both(lambda size: _latencies(size, latency_ns, marks, label))


def _latencies(size: Size, latency_ns: npt.NDArray[np.int64], marks: Sequence[tuple[str, float]], label: str) -> Html:
    low, high = max(float(latency_ns.min()), 1.0), float(latency_ns.max())
    low, high = low * 0.9, max(high * 1.1, low * 2.6)
    edges = np.geomspace(low, high, 49)
    counts = np.histogram(latency_ns, edges)[0]
    ticks = even_ticks(100 * float(counts.max()) / latency_ns.size, lambda value: f"{value:g}", 4)
    plot = Plot(size, 300, (low, high, True), (0, ticks[-1].at), right=24, top=64)
    plot.axes(_time_ticks(low, high, 8 if size.is_wide else 4), ticks, "time of a fetch (logarithmic)", "share of fetches, %")
    strips_ = [(plot.x(a), plot.x(b)) for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]
    for (begin, end), number in zip(strips_, counts.tolist(), strict=True):
        plot.bar(begin, max(end - begin - 1, 0.5), 0, 100 * number / latency_ns.size, "bar-known")
    plot.uprights([(ns, f"{name} {words.time(ns)}") for name, ns in marks])
    tips = [
        f"{words.time(a)} to {words.time(b)}\n{words.count(number)} fetches, {words.percent(number / latency_ns.size)}"
        for a, b, number in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    ]
    plot.tips(strips_, tips)
    return plot.svg(label)


def _time_ticks(low: float, high: float, wanted: int) -> list[Tick]:
    """At 1, 2 and 5 times powers of ten; at powers of ten alone where these are too many."""
    steps = [factor * 10.0**power for power in range(13) for factor in (1, 2, 5)]
    fine = [Tick(each, words.time(each)) for each in steps if low <= each <= high]
    return fine if len(fine) <= wanted else power_ticks(low, high, 10, words.time, wanted)
