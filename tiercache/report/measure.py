"""What a page needs beside the replay itself: curves, misses by kind, the working set. Costs at most as much again, and some
seconds for the curves, which long traces give from a sample."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from tiercache.assemble import stride_of
from tiercache.config import StoreConfig
from tiercache.lab.bounds import Bounds, Uses, bounds, uses_of
from tiercache.lab.kinds import Kinds, everything
from tiercache.lab.replay import Replay
from tiercache.lab.sampling import Sample, sample
from tiercache.lab.simulator import Counts, simulate
from tiercache.lab.tiers import ByKind, TierCounts, simulate_kinds
from tiercache.lab.trace import Trace
from tiercache.lab.windows import windows
from tiercache.level import Level
from tiercache.policies import POLICIES
from tiercache.recording.blocks import RecordedTable
from tiercache.report import words
from tiercache.report.facts import Choice, Facts, Line, Mark, Served, SizeCurve, Subject, best_of_sizes

SAMPLED_ROWS = 1_000_000
"""Rows asked for of a trace that curves are counted with, about; all of a shorter one."""

_SAMPLED_BATCHES = 50_000
"""The same of batches, where two tiers plan one after the other."""

_GRID = 14
"""Sizes of a curve beside the chosen ones, their halves and doubles."""

_SMALLEST = 1 / 512
"""Smallest size of a curve, as a share of the touched rows."""

Progress = Callable[[int], Callable[[], Any]]
"""(steps to come) -> what is called after each."""


class _Part(NamedTuple):
    """What curves are counted with: a sample of a trace, without empty batches."""

    sampled: Sample
    trace: Trace
    uses: Uses

    def limits(self, slots: int) -> Bounds:
        """The bounds at so many slots of the whole."""
        return self.sampled.adjusted_bounds(bounds(self.sampled.slots(slots), self.uses))


def _part(trace: Trace, most_batches: int | None = None) -> _Part:
    most = SAMPLED_ROWS if most_batches is None or trace.num_batches <= most_batches else most_batches
    sampled = sample(*trace, rate=min(1.0, most / max(trace.rows.size, 1)))
    assert sampled.offsets is not None
    part = Trace(sampled.rows, np.unique(np.append(0, sampled.offsets)))
    return _Part(sampled, part, uses_of(part))


def of_policies(
    subject: Subject, trace: Trace, uses: Uses, replays: Sequence[Replay], policies: Sequence[str], progress: Progress
) -> Facts:
    """The facts of policies that were simulated, each at each size. uses: of the trace."""
    best = best_of_sizes(replays)
    slot_bytes = best[0].slot_bytes
    sizes = _sizes([each.capacity for each in best], uses.rows.size)
    done = progress(len(sizes) * (len(policies) + 1) + len(best))
    part = _part(trace)
    rates = {}
    for policy in dict.fromkeys(policies):
        counts: list[Counts] = []
        for slots in sizes:
            counts.append(part.sampled.adjusted(simulate(policy, part.sampled.slots(slots), *part.trace)))
            done()
        rates[policy] = tuple(each.hit_rate for each in counts)
    lines = [Line(policy, False, each) for policy, each in rates.items()]
    accesses = max(uses.number.size, 1)
    marks = [Mark(each.tier, sizes.index(each.capacity), each.hits / accesses) for each in replays]
    curve = SizeCurve(
        "Tier", "share of accesses that the tier served", tuple(slots * slot_bytes for slots in sizes), slot_bytes,
        (*lines, *_bounds(part, sizes, done)), tuple(dict.fromkeys(marks)), part.sampled.rate,
    )  # fmt: skip
    choices = [_choice(f"{each.tier}", rates[each.tier], sizes, each.capacity, slot_bytes) for each in best]
    served = [_served_by_policy(each, subject.kinds or everything("all rows"), trace, uses, done) for each in best]
    return _facts(subject, "policies", replays, [curve], choices, served, trace, uses)


def of_tiers(
    subject: Subject,
    config: StoreConfig,
    tables: Sequence[RecordedTable],
    trace: Trace,
    uses: Uses,
    replay: Replay,
    progress: Progress,
) -> Facts:
    """The facts of the tiers of a config, simulated or live. Rows are rows of the store; uses: of the trace."""
    tiers = {"host": replay.capacity} if replay.device is None else {"device": replay.device.capacity, "host": replay.capacity}
    sizes = {tier: _sizes([slots], uses.rows.size) for tier, slots in tiers.items()}
    done = progress(2 * sum(map(len, sizes.values())) + 1)
    part = _part(trace, _SAMPLED_BATCHES if len(tiers) > 1 else None)
    kinds = subject.kinds or everything("all rows")
    counted, missed = simulate_kinds(config, tables, trace, kinds)
    done()
    curves = [_tier_curve(tier, config, tables, tiers, sizes[tier], part, replay, done) for tier in tiers]
    choices = [
        _choice(f"{curve.tier}, {curve.lines[0].name}", curve.lines[0].rates, sizes[tier], tiers[tier], replay.slot_bytes)
        for tier, curve in zip(tiers, curves, strict=True)
    ]
    expected = [each.counts for each in (replay.device, replay) if each is not None]
    same = not replay.warm and [each.counts for each in counted] == expected
    served = [_served_by_tiers(counted, missed, kinds, uses)] if same else []
    mode = "live" if replay.latency_ns.size else "tiers"
    return _facts(subject, mode, [replay], curves, choices, served, trace, uses)


def _facts(
    subject: Subject,
    mode: str,
    replays: Sequence[Replay],
    curves: Sequence[SizeCurve],
    choices: Sequence[Choice],
    served: Sequence[Served],
    trace: Trace,
    uses: Uses,
) -> Facts:
    made = f"{datetime.now(UTC):%-d %B %Y, %H:%M} UTC, by tiercache {version('tiercache')}"
    sizes = uses.number.size, uses.rows.size, trace.num_batches, trace.rows.size
    parts = tuple(replays), tuple(curves), tuple(choices), tuple(served)
    return Facts(subject, made, mode, *parts, windows(uses), *sizes)


def _sizes(chosen: Sequence[int], touched_rows: int) -> list[int]:
    """Slots of a curve: a grid up to all rows touched, and the chosen sizes with their halves and doubles."""
    least = max(1, min(round(touched_rows * _SMALLEST), min(chosen) // 2))
    most = max(touched_rows, 2 * min(max(chosen), touched_rows), *chosen)
    grid = np.geomspace(least, most, _GRID).round().astype(np.int64).tolist()
    near = [size for slots in chosen for size in _near(slots)]
    apart = [size for size in grid if all(abs(size - other) > 0.12 * other for other in near)]
    return sorted({*apart, *near})


def _near(slots: int) -> tuple[int, int, int]:
    return max(1, slots // 2), slots, 2 * slots


def _choice(tier: str, rates: Sequence[float], sizes: Sequence[int], slots: int, slot_bytes: int) -> Choice:
    half, here, twice = (rates[sizes.index(each)] for each in _near(slots))
    return Choice(tier, slots * slot_bytes, (half, here, twice))


def _bounds(part: _Part, sizes: Sequence[int], done: Callable[[], Any], more: int = 0) -> list[Line]:
    """Lines of the bounds. more: slots that are there beside each size."""
    limits = []
    for slots in sizes:
        limits.append(part.limits(slots + more))
        done()
    named = (("Belady", "belady"), ("static", "static"), ("unbounded", "unbounded"))
    return [Line(name, True, tuple(getattr(limit, key) / max(limit.accesses, 1) for limit in limits)) for name, key in named]


def _tier_curve(
    tier: str,
    config: StoreConfig,
    tables: Sequence[RecordedTable],
    tiers: Mapping[str, int],
    sizes: Sequence[int],
    part: _Part,
    replay: Replay,
    done: Callable[[], Any],
) -> SizeCurve:
    """The curve of one tier of a config; the other one stays as it is."""
    stride = stride_of((table.record_bytes for table in tables), config)
    shared = len(tiers) > 1 and tier == "host"
    rates = []
    for slots in sizes:
        wanted = {**tiers, tier: slots}
        update: dict[str, Any] = {}
        for name, number in wanted.items():
            update[name] = getattr(config, name).model_copy(update={"capacity": number * stride})
        sized, rate = config.model_copy(update=update), part.sampled.rate
        found, _ = simulate_kinds(sized, tables, part.trace, everything("all"), rate=rate)
        hits = sum(each.counts.hits for each in found) if shared else found[0].counts.hits
        accesses = found[0].counts.accesses
        rates.append(part.sampled.adjusted(Counts(accesses, hits, accesses - hits)).hit_rate)
        done()
    policy = replay.tier if replay.device is None or tier == "host" else replay.device.policy
    hits = replay.hits if tier == "host" else 0 if replay.device is None else replay.device.counts.hits
    mark = Mark(policy, sizes.index(tiers[tier]), hits / max(replay.bounds.accesses, 1))
    limits = _bounds(part, sizes, done, tiers["device"] if shared else 0)
    what = "both tiers together served" if shared else f"the {tier} tier served"
    return SizeCurve(
        f"{tier.capitalize()} tier", f"share of accesses that {what}", tuple(slots * stride for slots in sizes), stride,
        (Line(policy, False, tuple(rates)), *limits), (mark,), part.sampled.rate,
    )  # fmt: skip


def _served_by_policy(replay: Replay, kinds: Kinds, trace: Trace, uses: Uses, done: Callable[[], Any]) -> Served:
    level = Level(POLICIES[replay.tier], replay.capacity)
    _, missed = level.replay(*trace, kinds.edges)
    done()
    slot_bytes = replay.slot_bytes
    return _served(_title(replay.tier, replay.capacity * slot_bytes), ByKind(missed, missed), ("tier",), kinds, uses)


def _served_by_tiers(tiers: Sequence[TierCounts], missed: ByKind, kinds: Kinds, uses: Uses) -> Served:
    title = " over ".join(_title(f"{each.tier} tier, {each.policy}", each.capacity * each.slot_bytes) for each in tiers)
    return _served(title, missed, tuple(f"{each.tier} tier" for each in tiers), kinds, uses)


def _title(tier: str, num_bytes: int) -> str:
    return f"{tier}, {words.size(num_bytes)}"


def _served(title: str, missed: ByKind, tiers: Sequence[str], kinds: Kinds, uses: Uses) -> Served:
    accesses, fresh = kinds.accesses(uses), kinds.sizes(uses.rows)
    above, below = accesses - missed.missed_above, missed.missed_above - missed.missed
    hits = (above,) if len(tiers) == 1 else (above, below)
    return Served(title, kinds.names, tuple(zip(tiers, hits, strict=True)), missed.missed - fresh, fresh)
