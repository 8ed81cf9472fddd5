"""The head of a page: what was replayed, the result in two sentences, and the numbers that stand out."""

import numpy as np

from tiercache.report import words
from tiercache.report.facts import Facts, best_of_sizes
from tiercache.report.html import Html, join, tag
from tiercache.report.rows import WARM
from tiercache.report.words import percent, short


def header(facts: Facts) -> Html:
    """Title, result and tiles."""
    return tag(
        "header",
        tag("p", "tiercache replay", class_="kicker"),
        tag("h1", facts.subject.title),
        tag("p", lede(facts), class_="lede"),
        tag("dl", *(_tile(*each) for each in tiles(facts)), class_="tiles"),
    )


def _tile(name: str, value: str, more: str) -> Html:
    return tag("div", tag("dt", name), join((tag("dd", value, class_="value"), tag("dd", more))))


def lede(facts: Facts) -> str:
    """The result in two sentences."""
    if facts.mode == "policies":
        best = best_of_sizes(facts.replays)
        first, last = best[0], best[-1]
        said = (
            f"A tier of {words.size(last.capacity * last.slot_bytes)} under {last.tier} serves {_rate(facts, last.hits)} of "
            f"{short(facts.accesses)} accesses from memory; no policy of that size could serve more than "
            f"{_rate(facts, last.bounds.belady)}."
        )
        if len(best) > 1:
            smallest = words.size(first.capacity * first.slot_bytes)
            said += f" At {smallest} the best is {first.tier}, with {_rate(facts, first.hits)}."
        return said
    (replay,) = facts.replays
    tiers = [curve.tier for curve in facts.curves]
    names = words.listed([f"{_size_of(facts, tier)} of {tier.split()[0].lower()} memory" for tier in tiers])
    done = "served" if facts.mode == "live" else "would serve"
    said = f"{names} {done} {_rate(facts, replay.hits)} of {short(facts.accesses)} accesses."
    if facts.warm:
        return f"{said} {WARM}"
    return (
        f"{said} No policy with as many slots could serve more than {_rate(facts, replay.bounds.belady)}, and "
        f"{_rate(facts, facts.touched_rows)} are for rows that nobody had asked for before."
    )


def tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """(what, value, more) of the numbers that stand out."""
    best = max(facts.replays, key=lambda each: each.hits)
    who = f"under {best.tier}, {words.size(best.capacity * best.slot_bytes)}" if facts.mode == "policies" else "by all tiers"
    slot_bytes = best.slot_bytes
    shown = [
        ("Hit rate", _rate(facts, best.hits), who),
        ("Belady from empty" if facts.warm else "Best possible", _rate(facts, best.bounds.belady), "Belady, same size"),
        ("Working set", words.size(facts.touched_rows * slot_bytes), f"{short(facts.touched_rows)} distinct rows"),
    ]
    if facts.mode == "live":
        p50, p99 = np.percentile(best.latency_ns, (50, 99)).tolist()
        return [*shown, ("Median fetch", words.time(p50), f"p99 {words.time(p99)}")]
    return [*shown, ("Missed", words.size(best.bytes_missed), f"{short(best.counts.misses)} rows from below")]


def _rate(facts: Facts, hits: int) -> str:
    return percent(hits / max(facts.accesses, 1))


def _size_of(facts: Facts, tier: str) -> str:
    return next(words.size(curve.sizes[curve.marks[0].at]) for curve in facts.curves if curve.tier == tier)
