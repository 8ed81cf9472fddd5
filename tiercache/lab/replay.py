"""A trace replayed: through a live store, which reads and times every batch, or through the simulator, which counts.

Both count the same. Either way the result carries what no policy could beat at that capacity.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tiercache.lab.bounds import Bounds, Uses, bounds
from tiercache.lab.simulator import Counts, simulate
from tiercache.lab.trace import Trace
from tiercache.store import Store

OnBatch = Callable[[npt.NDArray[np.int64], npt.NDArray[np.uint8]], Any]
"""Told (rows int64[n], records uint8[n, record_bytes], valid during the call) after each batch."""


class Replay(NamedTuple):
    """What a replay of a trace gave.

    tier        the host tier's name, which is its policy's
    capacity    its slots
    counts      of the host tier
    bytes_read  from below it: what a live store read from the disk, and in a simulation the records missed
    bounds      at this capacity
    latency_ns  int64[b], time of each batch's fetch; empty in a simulation
    """

    tier: str
    capacity: int
    counts: Counts
    bytes_read: int
    bounds: Bounds
    latency_ns: npt.NDArray[np.int64]


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
    )


def replay_live(
    store: Store, trace: Trace, uses: Uses, *, table: str | None = None, on_batch: OnBatch | None = None
) -> Replay:
    """Fetch batch after batch of a trace as raw records. Rows are of `table`. Raises as `Store.fetch`."""
    before = store.stats()
    latency_ns = np.empty(trace.num_batches, np.int64)
    longest = int(np.diff(trace.offsets).max(initial=0))
    record_bytes = store.fetch([], table=table, raw=True).shape[-1]
    buffer = torch.empty((longest, record_bytes), dtype=torch.uint8)
    for batch, rows in enumerate(trace.batches()):
        out = buffer[: rows.size]
        start = time.perf_counter_ns()
        store.fetch(rows, out=out, table=table, raw=True)
        latency_ns[batch] = time.perf_counter_ns() - start
        if on_batch is not None:
            on_batch(rows, out.numpy())
    after = store.stats()
    hits, misses, bypasses = (
        getattr(after.host, column) - getattr(before.host, column) for column in ("hits", "misses", "bypasses")
    )
    read = [stats.storage.bytes_read if stats.storage else 0 for stats in (before, after)]
    return Replay(
        tier=after.host.policy,
        capacity=after.host.capacity_slots,
        counts=Counts(hits + misses, hits, misses, bypasses),
        bytes_read=read[1] - read[0],
        bounds=bounds(after.host.capacity_slots, uses),
        latency_ns=latency_ns,
    )
