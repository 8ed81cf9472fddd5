"""The sections of a page: a sentence that says what there is to see, a figure, and a table of its numbers."""

from collections.abc import Sequence

import numpy as np

from tiercache.report import figures, rows, words
from tiercache.report.facts import Choice, Facts, Served, SizeCurve, best_of_sizes
from tiercache.report.html import Html, join, table, tag
from tiercache.report.words import count, percent, short

_MOST_BARS = 6
"""Choices of tiers whose bars are drawn."""

_PERCENTILES = (50, 90, 99, 99.9)


def results(facts: Facts) -> Html:
    """The table that is printed too."""
    first, body = rows.result_rows(facts.replays)
    head = (first, *rows.COLUMNS)
    used = [at for at in range(len(head)) if any(row[at] for row in body)]
    caption = rows.title(facts.replays[0].bounds.accesses)
    shown = [head[at] for at in used], [[row[at] for at in used] for row in body]
    said = "Belady knows the future, static-optimal the totals, and an unbounded tier holds every row after its first use"
    if facts.warm:
        said += f". {rows.WARM}"
    else:
        said += ": no policy has more hits than the first at the same size, and no size more than the last."
    return _section("results", "Result", table(caption, *shown, id_="numbers-results"), tag("p", said, class_="note"))


def size_curves(facts: Facts) -> Html:
    """A curve for each tier."""
    parts = [part for number, curve in enumerate(facts.curves) for part in _curve(curve, number, len(facts.curves) > 1)]
    said = "Lines of policies begin with the hot sets of the config, or empty, whatever an image held; bounds begin empty."
    warm = [tag("p", said, class_="note")] if facts.warm else []
    return _section("curves", "Hit rate by size", tag("p", _accuracy(facts)), *warm, *parts)


def _curve(curve: SizeCurve, number: int, several: bool) -> list[Html]:
    policies, limits = ([line for line in curve.lines if line.is_bound is wanted] for wanted in (False, True))
    ends = f"from {words.size(curve.sizes[0])} to {words.size(curve.sizes[-1])}"
    said = "; ".join(f"{each.name} {percent(each.rates[0])} to {percent(each.rates[-1])}" for each in (*policies, *limits))
    label = f"Hit rate against the size of the {curve.tier.lower()}, {ends}: {said}."
    caption = f"{curve.tier}: {curve.hits_of}" if several else curve.hits_of.capitalize()
    body = [
        (words.size(size), count(size // curve.slot_bytes), *(percent(line.rates[at], 2) for line in curve.lines))
        for at, size in enumerate(curve.sizes)
    ]
    head = ("size", "rows", *(line.name for line in curve.lines))
    id_ = f"curve-{number}"
    return [_figure(id_, caption, figures.size_curve(curve, label)), _numbers(id_, caption, head, body)]


def _accuracy(facts: Facts) -> str:
    rate, error = facts.curves[0].rate, max(curve.error for curve in facts.curves)
    dots = "Dots are the replay itself, at the sizes that were chosen."
    if rate == 1:
        return f"Lines are simulations of the whole trace. {dots}"
    off = f"{100 * error:.2f} points" if error < 0.001 else f"{100 * error:.1f} points"
    return (
        f"Lines are simulations of a sample of {percent(rate, 2)} of all rows, with all their uses. {dots} "
        f"The lines are off by at most {off} there."
    )


def choices(facts: Facts) -> Html:
    """What half and twice each chosen size would bring."""
    said = tag("p", " ".join(_choice_said(facts, each) for each in facts.choices[-2:]))
    body = [
        (
            each.tier, words.size(each.size), percent(each.rates[1]),
            f"{percent(each.rates[0])} ({words.points(each.rates[0] - each.rates[1])})",
            f"{percent(each.rates[2])} ({words.points(each.rates[2] - each.rates[1])})",
        )
        for each in facts.choices
    ]  # fmt: skip
    head = ("tier" if facts.mode != "policies" else "policy", "chosen", "hit rate", "at half", "at twice")
    inner = table("Hit rates of the curve at each chosen size, and the difference in points", head, body, id_="numbers-choices")
    return _section("choices", "The chosen sizes", said, inner)


def _choice_said(facts: Facts, choice: Choice) -> str:
    more = choice.rates[2] - choice.rates[1]
    rows_ = short(abs(more) * facts.accesses)
    saved = f"{rows_} rows " + ("more from device memory" if choice.tier.startswith("Device") else "that need not be read")
    twice = words.size(2 * choice.size)
    if more < 0.0005:
        return f"{choice.tier}: {twice} instead of {words.size(choice.size)} would bring nothing to speak of."
    return (
        f"{choice.tier}: {twice} instead of {words.size(choice.size)} would bring {words.points(more)} points, "
        f"about {saved}."
    )


def served(facts: Facts) -> Html:
    """Where accesses were served, by tier and by kind."""
    by = tag("p", facts.subject.why)
    if facts.warm:
        why = "The tiers did not begin empty: they may have had rows before the first use, so accesses are not divided."
        return _section("served", "Where rows came from", by, tag("p", why, class_="note"))
    picked = np.unique(np.linspace(0, len(facts.served) - 1, min(_MOST_BARS, len(facts.served))).round().astype(int))
    parts = [facts.served[at] for at in picked]
    names = [name for name, _ in figures.segments_of(parts[0])]
    key = _key([(figures.segment_class(name), name) for name in names])
    label = "; ".join(f"{part.title}: {_shares_said(part)}" for part in parts)
    body = []
    for part in facts.served:
        columns = [numbers for _, numbers in figures.segments_of(part)]
        for at, name in enumerate(part.names):
            total = sum(int(numbers[at]) for numbers in columns)
            shares = [f"{count(numbers[at])} ({percent(numbers[at] / max(total, 1))})" for numbers in columns]
            body.append((f"{part.title}: {name}" if len(facts.served) > 1 else name, count(total), *shares))
    caption = "Accesses by where they were served" + (": " + parts[0].title if len(facts.served) == 1 else "")
    figure = _figure("served", caption, key, figures.served(parts, f"Share of accesses. {label}."))
    first = tag("p", "What is read the first time was in no tier before, and no size or policy would change that.")
    return _section(
        "served", "Where rows came from", by, first, figure, _numbers("served", caption, ("rows", "accesses", *names), body)
    )


def _shares_said(part: Served) -> str:
    """The shares of all kinds together, in words."""
    sums = [(name, int(numbers.sum())) for name, numbers in figures.segments_of(part)]
    total = max(sum(number for _, number in sums), 1)
    return ", ".join(f"{name} {percent(number / total)}" for name, number in sums)


def reads(facts: Facts) -> Html:
    """Bytes asked for, missed and read."""
    best = best_of_sizes(facts.replays) if facts.mode == "policies" else list(facts.replays)
    width = best[0].bytes_missed / best[0].counts.misses if best[0].counts.misses else float(best[0].slot_bytes)
    bars = [("asked for", facts.accesses * width)]
    said = "In a simulation each missing row is one read of its record; what a disk reads beyond that, a live replay tells."
    if facts.mode == "policies":
        named = [(f"missed under {each.tier}, {words.size(each.capacity * each.slot_bytes)}", each) for each in best]
        bars += [(name, float(each.bytes_missed)) for name, each in named]
    else:
        bars.append(("missed by the tiers", float(best[0].bytes_missed)))
    if facts.mode == "live":
        bars.append(("read from the disk", float(best[0].bytes_read)))
        said = (
            f"Read amplification is {best[0].amplification:.2f}: so many bytes were read from the disk for each byte of a "
            f"missing record, in {count(best[0].reads)} reads. Disks read whole blocks, and neighbours share a read."
        )
        if not best[0].amplification:
            said = "Nothing was read from the disk, so that there is no read amplification."
    label = "; ".join(f"{name} {words.size(value)}" for name, value in bars) + "."
    shown = figures.lengths([(name, value, words.size(value)) for name, value in bars], label)
    body = [(name, words.size(value), f"{value:,.0f}", percent(value / max(bars[0][1], 1))) for name, value in bars]
    return _section(
        "reads", "Bytes asked for and read", tag("p", said), _figure("reads", "Bytes of records", shown),
        _numbers("reads", "Bytes of records", ("bytes", "size", "exact", "of those asked for"), body),
    )  # fmt: skip


def latency(facts: Facts) -> Html:
    """Times of fetches; nothing for a simulation, which has none."""
    if facts.mode != "live":
        return Html()
    times = facts.replays[0].latency_ns
    named = dict(zip((f"p{each:g}" for each in _PERCENTILES), np.percentile(times, _PERCENTILES).tolist(), strict=True))
    named["max"] = float(times.max())
    said = ", ".join(f"{name} {words.time(ns)}" for name, ns in named.items())
    marks = [(name, named[name]) for name in ("p50", "p99")]
    caption = f"Times of {count(times.size)} fetches, one at a time"
    figure = _figure("latency", caption, figures.latencies(times, marks, f"{caption}: {said}."))
    numbers = _numbers("latency", caption, ("fetches", "time"), [(name, words.time(ns)) for name, ns in named.items()])
    return _section("latency", "Latency", tag("p", f"A fetch is a batch of the trace. {said}."), figure, numbers)


def working_set(facts: Facts) -> Html:
    """Distinct rows over time."""
    seen, slot_bytes = facts.windows, facts.replays[0].slot_bytes
    ends, share = np.cumsum(seen.accesses), seen.fresh / np.maximum(seen.accesses, 1)
    typical = float(np.median(seen.distinct))
    said = (
        f"The replay in {seen.accesses.size} windows of about {short(float(np.median(seen.accesses)))} accesses. A window asks "
        f"for {short(typical)} distinct rows (median), {words.size(typical * slot_bytes)}; in the last "
        f"one {percent(float(share[-1]))} of accesses are for rows that were never asked for before, in the first one "
        f"{percent(float(share[0]))}."
    )
    captions = ("Distinct rows of each window", "Share of accesses to new rows", "Distinct rows so far")
    swatches = [("bar-new", "for the first time"), ("bar-known", "asked for before")]
    key = _key(swatches)
    levels = [(size / slot_bytes, name) for name, size in _tier_sizes(facts) if size / slot_bytes < 1.4 * facts.touched_rows]
    drawn = (
        join((key, figures.window_bars(seen.distinct, seen.fresh, ends, f"{captions[0]}, {short(typical)} in the median."))),
        figures.over_time(
            100 * share, ends, "new, % of accesses",
            f"{captions[1]}: from {percent(float(share[0]))} to {percent(float(share[-1]))}.",
            said=lambda value: f"{value:.3g}",
        ),
        figures.over_time(
            seen.cumulative.astype(np.float64), ends, "rows", f"{captions[2]}: {count(facts.touched_rows)} at the end.",
            levels=levels, from_zero=True,
        ),
    )  # fmt: skip
    shown = [_figure(f"working-{at}", caption, each) for at, (caption, each) in enumerate(zip(captions, drawn, strict=True))]
    columns = ends, seen.batches, seen.distinct, seen.fresh, seen.cumulative
    body = [
        (*map(count, row), percent(each), words.size(int(row[2]) * slot_bytes))
        for row, each in zip(zip(*columns, strict=True), share.tolist(), strict=True)
    ]
    head = ("until access", "batch", "distinct rows", "new rows", "rows so far", "new, of accesses", "size of distinct rows")
    numbers = _numbers("working", "Windows of the replay", head, body)
    return _section("working", "Working set over time", tag("p", said), *shown, numbers)


def _tier_sizes(facts: Facts) -> list[tuple[str, int]]:
    """(name, bytes) of the chosen sizes, apart enough to be told apart, from the smallest."""
    if facts.mode == "policies":
        sizes = {each.capacity * each.slot_bytes for each in facts.replays}
        named = [(f"tier of {words.size(size)}", size) for size in sorted(sizes)]
    else:
        named = [(f"{curve.tier.lower()}, {words.size(curve.sizes[curve.marks[0].at])}", curve.sizes[curve.marks[0].at])
                 for curve in facts.curves]  # fmt: skip
    least = 0.09 * facts.touched_rows * facts.replays[0].slot_bytes
    kept: list[tuple[str, int]] = []
    for name, size in sorted(named, key=lambda pair: pair[1]):
        if not kept or size - kept[-1][1] >= least:
            kept.append((name, size))
    return kept


def about(facts: Facts) -> Html:
    """What was replayed, and how the numbers came to be."""
    pairs = (
        *facts.subject.about,
        ("accesses", f"{count(facts.accesses)}, each a distinct row of a batch; {count(facts.num_rows)} rows with duplicates"),
        ("batches", count(facts.num_batches)),
        ("touched rows", count(facts.touched_rows)),
        ("made", facts.made),
    )
    inner = tag("dl", *(part for name, value in pairs for part in (tag("dt", name), tag("dd", value))), class_="facts")
    command = tag("p", "Made by"), tag("pre", tag("code", facts.subject.command), tabindex="0")
    return _section("about", "About this replay", inner, *command)


def _section(id_: str, title: str, *parts: object) -> Html:
    return tag("section", tag("h2", title, id=f"{id_}-title"), *parts, id=id_, aria_labelledby=f"{id_}-title")


def _figure(id_: str, caption: str, *parts: object) -> Html:
    return tag("figure", tag("figcaption", caption), *parts, id=f"figure-{id_}")


def _key(swatches: Sequence[tuple[str, str]]) -> Html:
    """What colours mean: (class, name)."""
    return tag("ul", *(tag("li", tag("span", class_=f"swatch {kind}"), name) for kind, name in swatches), class_="key")


def _numbers(id_: str, caption: str, head: Sequence[str], body: Sequence[Sequence[object]]) -> Html:
    return tag("details", tag("summary", "Exact numbers"), table(caption, head, body, id_=f"numbers-{id_}"))
