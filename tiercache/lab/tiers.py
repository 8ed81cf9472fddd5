"""A store's tiers without bytes: what each would count, had it planned the batches of a trace one after the other.

The levels are made and planned by the code that the store uses, promotion included. What overlaps in a live store is not told
from a trace: where several fetches are in flight, their pins keep slots that would be free here.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tiercache.assemble import level_of, most_rising, options_of, stride_of
from tiercache.config import StoreConfig
from tiercache.lab.simulator import Counts
from tiercache.lab.trace import Trace, in_groups
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
    """The tiers of a config over tables of these sizes, the device's first; they begin empty. Rows are rows of the store.

    With `group_rows` what is counted are groups. on_batch: called after each batch of a stack of two. ConfigError as from
    `Store.open`, and where a batch is not whole groups.
    """
    num_rows, size = sum(table.num_rows for table in tables), config.group_rows
    stride = stride_of((table.record_bytes for table in tables), config)
    trace = in_groups(trace, size)
    named = {"device": config.device, "host": config.host}
    options = {name: options_of(name, tier, num_rows, size) for name, tier in named.items() if tier is not None}
    host = level_of("host", config.host, options, stride, num_rows, size)
    if config.device is None:
        host.replay(trace.rows, trace.offsets)
        return [_counts("host", host, stride * size)]
    device = level_of("device", config.device, options, stride, num_rows, size)
    most = most_rising(config.device, stride, size)
    for rows in trace.batches():
        plan = StackPlan(rows.size, above=True)
        if not plan_stack(device, host, plan, rows, 0, most, idly=True):
            assert plan.above is not None
            device.release(plan.above)
            host.release(plan.below)
        if on_batch is not None:
            on_batch()
    return [_counts("device", device, stride * size), _counts("host", host, stride * size)]


def _counts(tier: str, level: Level, stride: int) -> TierCounts:
    hits, misses, bypasses = (int(level.counters[column]) for column in (HITS, MISSES, BYPASSES))
    return TierCounts(tier, level.policy.name, level.capacity, stride, Counts(hits + misses, hits, misses, bypasses))
