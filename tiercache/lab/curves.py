"""Hit rate against cache size: policies and bounds over one trace, all of it or a sample."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tiercache.lab.bounds import Bounds, bounds, uses_of
from tiercache.lab.sampling import sample
from tiercache.lab.simulator import Counts, simulate
from tiercache.lab.trace import Trace, single

ONLINE = ("fifo", "lru", "lfu", "sieve", "s3fifo", "arc", "wtinylfu", "gittins")
"""Policies that need neither a profile nor the future."""


class Curves(NamedTuple):
    """Counts of each policy and the bounds at each capacity, in slots. touched_rows: distinct rows of the trace.

    Of a sample the counts are its own, the capacities and touched rows those of the whole trace, the latter about.
    """

    capacities: tuple[int, ...]
    touched_rows: int
    policies: dict[str, list[Counts]]
    bounds: list[Bounds]


def curves(trace: Trace, shares: Iterable[float], policies: Sequence[str] = ONLINE, *, rate: float = 1.0) -> Curves:
    """Simulate every policy at these shares of the touched rows (0.01 is 1 %), with the bounds. Takes tens of seconds
    for millions of accesses.

    rate: share of the rows that are looked at. With 0.01 that takes a hundredth of the time, and hit rates are off by some
    tenths of a point where the trace has millions of rows. ValueError where it is not above 0 and at most 1.
    """
    sampled = sample(*trace, rate=rate)
    part = single(sampled.rows) if sampled.offsets is None else Trace(sampled.rows, sampled.offsets)
    uses = uses_of(part)
    touched_rows = round(uses.rows.size / sampled.rate)
    capacities = tuple(max(1, round(share * touched_rows)) for share in shares)
    slots = [sampled.slots(capacity) for capacity in capacities]
    counts = {policy: [sampled.adjusted(simulate(policy, each, *part)) for each in slots] for policy in policies}
    limits = [sampled.adjusted_bounds(bounds(each, uses)) for each in slots]
    return Curves(capacities, touched_rows, counts, limits)
