"""What a store has counted since it was opened."""

from typing import NamedTuple

BOOKS_NS = 300
"""What a row that is asked for costs in a tier's books: what the slowest policies take in `bench/policies.py`."""


class CurvePoint(NamedTuple):
    """The hit rate that LRU would have had with so many slots, as far as a sample of the rows tells."""

    capacity_slots: int
    hit_rate: float


class LevelStats(NamedTuple):
    """One tier. Counts are of distinct rows of each batch; a tier is asked for what the one above it has not.

    policy             name of its policy
    capacity_slots     rows that it has room for; never more than the tables have
    capacity_bytes     bytes of these slots, each record as wide as the widest of all tables
    bookkeeping_bytes  bytes beside them: entries, index, the policy's state, the sample that the curve is counted with
    used_slots         slots that hold a row, or wait for one that is being read
    pinned_slots       slots that a fetch or a ticket in flight keeps from eviction
    hits               rows that were resident, or on their way to a slot already
    misses             rows that were not
    bypasses           misses that the policy gave no slot, so that only their caller got them
    curve              hit rates of LRU, begun empty, with the same rows and 1/8 to 8 times the slots
    curve_uses         uses of rows of the sample so far, which the curve is made of; with few it says little
    pays               whether the tier saves more than it costs; None where that is not known yet
    why                what that is judged by, to be read
    group_rows         rows in a slot; where these are several, what is said above of rows is of such groups
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
    curve: tuple[CurvePoint, ...]
    curve_uses: int
    pays: bool | None
    why: str
    group_rows: int = 1

    @property
    def hit_rate(self) -> float:
        """Share of distinct rows that were resident; 0 before the first fetch."""
        return self.hits / max(self.hits + self.misses, 1)

    def report(self) -> str:
        """Some lines on the tier, to be read."""
        asked = self.hits + self.misses
        held = f"{self.used_slots:,} of {self.capacity_slots:,} slots used, {self.capacity_bytes / 2**20:,.1f} MiB"
        what = "rows" if self.group_rows == 1 else f"groups of {self.group_rows} rows"
        lines = [f"{self.policy}: {self.hit_rate:.1%} of {asked:,} {what} were hits; {held}"]
        if self.curve_uses:
            shown = (f"{rate:.1%} at {slots / self.capacity_slots:.3g} x" for slots, rate in self.curve)
            lines.append(f"LRU, begun empty, would have, by {self.curve_uses:,} uses: " + ", ".join(shown))
        verdict = {True: "pays", False: "does not pay", None: "not judged yet"}[self.pays]
        return "\n".join([*lines, f"{verdict}: {self.why}"])


def host_pays(
    hits: int, misses: int, capacity_slots: int, row_ns: float, group_rows: int = 1
) -> tuple[bool | None, str]:
    """Whether a host tier saves more time than it costs, and why. row_ns: time that a row from below takes; 0 if unknown.

    A hit saves the time of a row from below, or of the rows of a group; each that is asked for costs BOOKS_NS.
    """
    if not row_ns:
        return None, "no fetch has read rows from below"
    if hits + misses < capacity_slots:
        return None, _too_early(hits + misses, capacity_slots)
    rate = hits / (hits + misses)
    unit_ns, unit = row_ns * group_rows, "row" if group_rows == 1 else "group"
    least = BOOKS_NS / unit_ns
    why = (
        f"a hit saves the {unit_ns / 1000:,.3g} us that a {unit} from below takes, and the books cost {BOOKS_NS / 1000:g} us "
        f"a {unit}: worth it from a hit rate of {least:.1%}, and it is {rate:.1%}"
    )
    return rate >= least, why


def device_pays(hits: int, risen: int, asked: int, capacity_slots: int) -> tuple[bool | None, str]:
    """Whether a device tier saves more records on the bus than it costs, and why. risen: rows that were copied to it."""
    if asked < capacity_slots:
        return None, _too_early(asked, capacity_slots)
    return hits >= risen, f"{hits:,} hits saved as many records on the bus, and {risen:,} were copied to make them"


def _too_early(asked: int, capacity_slots: int) -> str:
    return f"{asked:,} rows were asked for, and a tier is judged from as many as it has slots, {capacity_slots:,}"


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


class HotSetStats(NamedTuple):
    """A hot set that a tier began with: the tier's name, rows that were read, and seconds that this took."""

    tier: str
    rows: int
    seconds: float


class StoreStats(NamedTuple):
    """A whole store.

    fetches  calls of `fetch` and `prefetch`
    rows     rows asked for in them, duplicates included; these are always single rows
    row_ns   time that `fetch` has waited for rows from below the tiers, a row, in ns; 0 before it has
    flights  fetches and tickets that have not let go of their rows yet
    host     the tier in host memory
    storage  the disk; None where every table is a source
    device   the tier above the host's, on a device; None without one
    recordings  those that go on
    hot_sets  what the tiers began with
    """

    fetches: int
    rows: int
    row_ns: float
    flights: int
    host: LevelStats
    storage: StorageStats | None
    device: LevelStats | None = None
    recordings: tuple[RecordingStats, ...] = ()
    hot_sets: tuple[HotSetStats, ...] = ()

    def report(self) -> str:
        """Some lines on each tier, to be read."""
        tiers = {"device": self.device, "host": self.host}
        return "\n".join(f"{name}, {tier.report()}" for name, tier in tiers.items() if tier is not None)
