"""What a store has counted since it was opened."""

from typing import NamedTuple


class LevelStats(NamedTuple):
    """One tier. Counts are of distinct rows of each batch; a tier is asked for what the one above it has not.

    policy             name of its policy
    capacity_slots     records that it has room for; never more than the tables have rows
    capacity_bytes     bytes of these slots, each as wide as the widest record of all tables
    bookkeeping_bytes  bytes beside them: entries, index, the policy's state
    used_slots         slots that hold a row, or wait for one that is being read
    pinned_slots       slots that a fetch or a ticket in flight keeps from eviction
    hits               rows that were resident, or on their way to a slot already
    misses             rows that were not
    bypasses           misses that the policy gave no slot, so that only their caller got them
    """

    policy: str
    capacity_slots: int
    capacity_bytes: int
    bookkeeping_bytes: int
    used_slots: int
    pinned_slots: int
    hits: int
    misses: int
    bypasses: int

    @property
    def hit_rate(self) -> float:
        """Share of distinct rows that were resident; 0 before the first fetch."""
        return self.hits / max(self.hits + self.misses, 1)


class StorageStats(NamedTuple):
    """The disk. What the probe of the engines read at open is not counted.

    engine             the engine that serves, "uring" or "threads"
    alignment          bytes that offsets and lengths of reads are multiples of; 1 where they go through the page cache
    reads              requests that have landed; neighbouring rows share one
    bytes_read         bytes of these requests, with what alignment and gaps between neighbours add
    jobs               jobs in progress now: fetches and prefetches whose reads have not all landed
    probe_reads_per_s  reads per second that each engine reached in the probe; empty where one was named or is the only one
    notes              what was warned of at open: what could not be had, and fp8 values that seem to miss their scale
    """

    engine: str
    alignment: int
    reads: int
    bytes_read: int
    jobs: int
    probe_reads_per_s: dict[str, float]
    notes: tuple[str, ...]


class RecordingStats(NamedTuple):
    """A recording that goes on.

    path             where to
    batches          fetches and prefetches that were taken
    rows             rows asked for in them, duplicates included
    dropped_batches  those that were left out, as the disk was too slow or failed
    dropped_rows     rows asked for in those
    bytes_written    bytes of the file so far
    error            why nothing is recorded any more, or None
    """

    path: str
    batches: int
    rows: int
    dropped_batches: int
    dropped_rows: int
    bytes_written: int
    error: str | None


class StoreStats(NamedTuple):
    """A whole store.

    fetches  calls of `fetch` and `prefetch`
    rows     rows asked for in them, duplicates included
    flights  fetches and tickets that have not let go of their rows yet
    host     the tier in host memory
    storage  the disk; None where every table is a source
    device   the tier above the host's, on a device; None without one
    recordings  those that go on
    """

    fetches: int
    rows: int
    flights: int
    host: LevelStats
    storage: StorageStats | None
    device: LevelStats | None = None
    recordings: tuple[RecordingStats, ...] = ()
