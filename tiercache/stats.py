"""What a store has counted since it was opened."""

from typing import NamedTuple


class LevelStats(NamedTuple):
    """One tier. Counts are of distinct rows of each batch; a tier is asked for what the one above it has not."""

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
    """The disk. `probe_reads_per_s` has what each engine reached at open, where it was measured."""

    engine: str
    alignment: int
    reads: int
    bytes_read: int
    jobs: int
    probe_reads_per_s: dict[str, float]
    notes: tuple[str, ...]


class StoreStats(NamedTuple):
    """A whole store. `flights` are fetches and tickets that have not let go of their rows yet."""

    fetches: int
    rows: int
    flights: int
    host: LevelStats
    storage: StorageStats | None
    device: LevelStats | None = None
