"""A trace replayed: through a live store, which reads and times every batch, or through the simulator, which counts.

Both count the same. Either way the result carries what no policy could beat at that capacity.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tiercache.config import StoreConfig
from tiercache.lab.bounds import Bounds, Uses, bounds
from tiercache.lab.simulator import Counts, simulate
from tiercache.lab.tiers import TierCounts, simulate_tiers
from tiercache.lab.trace import Trace
from tiercache.recording.blocks import RecordedTable
from tiercache.stats import LevelStats
from tiercache.store import Store

OnBatch = Callable[[npt.NDArray[np.int64], npt.NDArray[np.uint8]], Any]
"""Told (rows int64[n], records uint8[n, record_bytes], valid during the call) after each batch."""


class Replay(NamedTuple):
    """What a replay of a trace gave.

    tier        the host tier's name, which is its policy's
    capacity    its slots
    counts      of the host tier, in groups where the tiers keep such
    bytes_read  from below it: what a live store read from the disk, and in a simulation the records missed
    bounds      at this capacity; of two tiers, at that of both
    latency_ns  int64[b], time of each batch's fetch; empty in a simulation
    reads       requests to the disk; in a simulation one a record missed
    device      the tier above the host's, or None
    slot_bytes  bytes of a slot of either tier; in a simulation of policies, of a record
    bytes_missed  bytes of the records that no tier had
    warm        whether a tier began with rows: then it may have more hits than the bounds, which are of tiers that begin empty
    """

    tier: str
    capacity: int
    counts: Counts
    bytes_read: int
    bounds: Bounds
    latency_ns: npt.NDArray[np.int64]
    reads: int = 0
    device: TierCounts | None = None
    slot_bytes: int = 0
    bytes_missed: int = 0
    warm: bool = False

    @property
    def amplification(self) -> float:
        """Bytes that a live store read from the disk for each byte of a record missed; 0 where it read nothing, or is none."""
        return self.bytes_read / self.bytes_missed if self.latency_ns.size and self.bytes_missed else 0.0

    @property
    def hits(self) -> int:
        """Of all tiers."""
        return self.counts.hits + (0 if self.device is None else self.device.counts.hits)


def replay_simulated(
    policy: str, capacity: int, trace: Trace, uses: Uses, *, record_bytes: int, **options: Any
) -> Replay:
    """Replay without bytes. uses: `uses_of(trace)`; options: parameters of the policy."""
    counts = simulate(policy, capacity, *trace, **options)
    return Replay(
        tier=policy,
        capacity=capacity,
        counts=counts,
        bytes_read=counts.misses * record_bytes,
        bounds=bounds(capacity, uses),
        latency_ns=np.empty(0, np.int64),
        reads=counts.misses,
        slot_bytes=record_bytes,
        bytes_missed=counts.misses * record_bytes,
    )


def replay_tiers(
    config: StoreConfig,
    tables: Sequence[RecordedTable],
    trace: Trace,
    uses: Uses,
    *,
    on_batch: Callable[[], object] | None = None,
) -> Replay:
    """Replay through the tiers of a config, without bytes. Rows are rows of a store of these tables; see `simulate_tiers`.

    uses: `uses_of(in_groups(trace, config.group_rows))`.
    """
    tiers = [tier for tier in (config.device, config.host) if tier is not None]
    *above, host = simulate_tiers(config, tables, trace, on_batch=on_batch)
    device = above[0] if above else None
    num_missed = host.counts.misses * config.group_rows
    missed = _missed(num_missed, [table.record_bytes for table in tables], [table.num_rows for table in tables], trace)
    return Replay(
        tier=host.policy,
        capacity=host.capacity,
        counts=host.counts,
        bytes_read=missed,
        bounds=bounds(host.capacity + (0 if device is None else device.capacity), uses),
        latency_ns=np.empty(0, np.int64),
        reads=num_missed,
        device=device,
        slot_bytes=host.slot_bytes,
        bytes_missed=missed,
        warm=any(tier.hot_set is not None and tier.policy != "static" for tier in tiers),
    )


def _missed(num_missed: int, widths: Sequence[int], num_rows: Sequence[int], trace: Trace) -> int:
    """Bytes of the records missed. They are not told apart by table: each counts as wide as the average one asked for."""
    which = np.searchsorted(np.cumsum(num_rows), trace.rows, side="right")
    asked = np.bincount(which, minlength=len(widths))[: len(widths)]
    return round(num_missed * float((asked * np.array(widths)).sum()) / max(int(asked.sum()), 1))


def replay_live(
    store: Store, trace: Trace, uses: Uses, *, table: str | None = None, on_batch: OnBatch | None = None
) -> Replay:
    """Fetch batch after batch of a trace as raw records. Raises as `Store.fetch`.

    Rows are of `table`; without one they are rows of the store, each batch of one of its tables. uses: as for `replay_tiers`.
    """
    before = store.stats()
    latency_ns = np.empty(trace.num_batches, np.int64)
    longest = int(np.diff(trace.offsets).max(initial=0))
    names = store.tables if table is None else (table,)
    ends = np.cumsum([store.num_rows(name) for name in names])
    widths = [store.record_bytes(name) for name in names]
    buffer = torch.empty(longest * max(widths), dtype=torch.uint8)
    for batch, rows in enumerate(trace.batches()):
        which = 0 if table is not None or not rows.size else min(int(np.searchsorted(ends, rows[0], "right")), ends.size - 1)
        local = rows if which == 0 else rows - ends[which - 1]
        out = buffer[: rows.size * widths[which]].view(rows.size, widths[which])
        start = time.perf_counter_ns()
        store.fetch(local, out=out, table=names[which], raw=True)
        latency_ns[batch] = time.perf_counter_ns() - start
        if on_batch is not None:
            on_batch(rows, out.numpy())
    after = store.stats()
    storage = [(s.storage.bytes_read, s.storage.reads) if s.storage else (0, 0) for s in (before, after)]
    device = None if after.device is None or before.device is None else _since("device", after.device, before.device)
    host = _since("host", after.host, before.host)
    num_missed = host.counts.misses * store.config.group_rows
    return Replay(
        tier=host.policy,
        capacity=host.capacity,
        counts=host.counts,
        bytes_read=storage[1][0] - storage[0][0],
        bounds=bounds(host.capacity + (0 if device is None else device.capacity), uses),
        latency_ns=latency_ns,
        reads=storage[1][1] - storage[0][1],
        device=device,
        slot_bytes=host.slot_bytes,
        bytes_missed=_missed(num_missed, widths, [store.num_rows(name) for name in names], trace),
        warm=any(tier is not None and tier.used_slots > 0 for tier in (before.device, before.host)),
    )


def _since(tier: str, after: LevelStats, before: LevelStats) -> TierCounts:
    """What a tier has counted meanwhile."""
    hits, misses, bypasses = (getattr(after, column) - getattr(before, column) for column in ("hits", "misses", "bypasses"))
    slot_bytes = after.capacity_bytes // after.capacity_slots
    return TierCounts(tier, after.policy, after.capacity_slots, slot_bytes, Counts(hits + misses, hits, misses, bypasses))
