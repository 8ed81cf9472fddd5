"""Hit rate against cache size: policies and bounds over one trace."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tiercache.lab.bounds import Bounds, bounds, uses_of
from tiercache.lab.simulator import Counts, simulate
from tiercache.lab.trace import Trace

ONLINE = ("fifo", "lru", "lfu", "sieve", "s3fifo", "arc", "wtinylfu", "gittins")
"""Policies that need neither a profile nor the future."""


class Curves(NamedTuple):
    """Counts of each policy and the bounds at each capacity, in slots. touched_rows: distinct rows of the trace."""

    capacities: tuple[int, ...]
    touched_rows: int
    policies: dict[str, list[Counts]]
    bounds: list[Bounds]


def curves(trace: Trace, shares: Iterable[float], policies: Sequence[str] = ONLINE) -> Curves:
    """Simulate every policy at these shares of the touched rows (0.01 is 1 %), with the bounds. Takes tens of seconds
    for millions of accesses."""
    uses = uses_of(trace)
    capacities = tuple(max(1, round(share * uses.rows.size)) for share in shares)
    counts = {policy: [simulate(policy, capacity, *trace) for capacity in capacities] for policy in policies}
    return Curves(capacities, uses.rows.size, counts, [bounds(capacity, uses) for capacity in capacities])
