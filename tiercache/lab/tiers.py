"""A store's tiers without bytes: what each would count, had it planned the batches of a trace one after the other.

The levels are made and planned by the code that the store uses, promotion included. What overlaps in a live store is not told
from a trace: where several fetches are in flight, their pins keep slots that would be free here.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tiercache.assemble import level_of, options_of
from tiercache.config import StoreConfig
from tiercache.errors import ConfigError
from tiercache.lab.sampling import choose, limit_of, scaled
from tiercache.lab.simulator import Counts
from tiercache.lab.trace import Trace
from tiercache.level import BYPASSES, HITS, MISSES, Level
from tiercache.recording.blocks import RecordedTable
from tiercache.stack import StackPlan, plan_stack


class TierCounts(NamedTuple):
    """One tier: "device" or "host", its policy and slots of so many bytes, and what it counted."""

    tier: str
    policy: str
    capacity: int
    slot_bytes: int
    counts: Counts


class Levels(NamedTuple):
    """The levels of a config (device None without such a tier), bytes of a slot, and how many rows may rise in one batch."""

    device: Level | None
    host: Level
    stride: int
    most: int


def levels_of(config: StoreConfig, tables: Sequence[RecordedTable], *, rate: float = 1.0) -> Levels:
    """The levels that a store of this config would have, empty. ConfigError as from `Store.open`.

    rate: that of the `sample` that they are for: they have so much less slots, and so many fewer rows rise.
    """
    num_rows, stride = sum(table.num_rows for table in tables), slot_bytes_of(config, tables)
    named = {"device": config.device, "host": config.host}
    levels = {}
    for name, tier in named.items():
        if tier is None:
            continue
        options = options_of(name, tier, num_rows)
        if "hot_rows" in options and rate < 1:
            options["hot_rows"] = options["hot_rows"][choose(options["hot_rows"], limit_of(rate))]
        slots = tier.capacity // stride
        small = tier if rate == 1 or not slots else tier.model_copy(update={"capacity": scaled(slots, rate) * stride})
        levels[name] = level_of(name, small, {name: options}, stride, num_rows)
    most = 0
    if config.device is not None:
        most = config.device.promotion // stride
        if not most:
            raise ConfigError(f"device.promotion = {config.device.promotion}: holds no row of {stride} bytes")
    return Levels(levels.get("device"), levels["host"], stride, scaled(most, rate) if most else 0)


def slot_bytes_of(config: StoreConfig, tables: Sequence[RecordedTable]) -> int:
    """Bytes of a slot of either tier."""
    unit = 8 if config.device is None else 16
    return -(-max(table.record_bytes for table in tables) // unit) * unit


def simulate_tiers(
    config: StoreConfig, tables: Sequence[RecordedTable], trace: Trace, *, on_batch: Callable[[], object] | None = None
) -> list[TierCounts]:
    """The tiers of a config over tables of these sizes, the device's first; they begin empty. Rows are rows of the store.

    on_batch: called after each batch of a stack of two. ConfigError as from `Store.open`.
    """
    device, host, stride, most = levels_of(config, tables)
    if device is None:
        host.replay(trace.rows, trace.offsets)
        return [_counts("host", host, stride)]
    for rows in trace.batches():
        plan = StackPlan(rows.size, above=True)
        if not plan_stack(device, host, plan, rows, 0, most, idly=True):
            assert plan.above is not None
            device.release(plan.above)
            host.release(plan.below)
        if on_batch is not None:
            on_batch()
    return [_counts("device", device, stride), _counts("host", host, stride)]


def _counts(tier: str, level: Level, stride: int) -> TierCounts:
    hits, misses, bypasses = (int(level.counters[column]) for column in (HITS, MISSES, BYPASSES))
    return TierCounts(tier, level.policy.name, level.capacity, stride, Counts(hits + misses, hits, misses, bypasses))
