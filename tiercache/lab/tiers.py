"""A store's tiers without bytes: what each would count, had it planned the batches of a trace one after the other.

The levels are made and planned by the code that the store uses, promotion included. What overlaps in a live store is not told
from a trace: where several fetches are in flight, their pins keep slots that would be free here.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tiercache import hot
from tiercache.assemble import Beginning, beginning_of, level_of
from tiercache.config import StoreConfig
from tiercache.errors import ConfigError
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


def simulate_tiers(
    config: StoreConfig, tables: Sequence[RecordedTable], trace: Trace, *, on_batch: Callable[[], object] | None = None
) -> list[TierCounts]:
    """The tiers of a config over tables of these sizes, the device's first. Rows are rows of the store.

    They begin with the config's hot sets, or empty: what an image would bring is not looked at.

    on_batch: called after each batch of a stack of two. ConfigError as from `Store.open`.
    """
    num_rows = sum(table.num_rows for table in tables)
    unit = 8 if config.device is None else 16
    stride = -(-max(table.record_bytes for table in tables) // unit) * unit
    begin = beginning_of(config, num_rows)
    host = level_of("host", config.host, begin.options, stride, num_rows)
    if config.device is None:
        _begin({"host": host}, begin)
        host.replay(trace.rows, trace.offsets)
        return [_counts("host", host, stride)]
    device = level_of("device", config.device, begin.options, stride, num_rows)
    _begin({"device": device, "host": host}, begin)
    most = config.device.promotion // stride
    if not most:
        raise ConfigError(f"device.promotion = {config.device.promotion}: holds no row of {stride} bytes")
    for rows in trace.batches():
        plan = StackPlan(rows.size, above=True)
        if not plan_stack(device, host, plan, rows, 0, most, idly=True):
            assert plan.above is not None
            device.release(plan.above)
            host.release(plan.below)
        if on_batch is not None:
            on_batch()
    return [_counts("device", device, stride), _counts("host", host, stride)]


def _begin(levels: dict[str, Level], begin: Beginning) -> None:
    hot.release(levels, hot.admit(levels, begin.hot_sets))


def _counts(tier: str, level: Level, stride: int) -> TierCounts:
    hits, misses, bypasses = (int(level.counters[column]) for column in (HITS, MISSES, BYPASSES))
    return TierCounts(tier, level.policy.name, level.capacity, stride, Counts(hits + misses, hits, misses, bypasses))
