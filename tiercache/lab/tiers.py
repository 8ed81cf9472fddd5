"""A store's tiers without bytes: what each would count, had it planned the batches of a trace one after the other.

The levels are made and planned by the code that the store uses, promotion included. What overlaps in a live store is not told
from a trace: where several fetches are in flight, their pins keep slots that would be free here.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache import hot
from tiercache.assemble import Beginning, beginning_of, level_of, most_rising, stride_of
from tiercache.config import StoreConfig
from tiercache.lab.kinds import Kinds, everything
from tiercache.lab.sampling import choose, limit_of, scaled
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


class ByKind(NamedTuple):
    """Distinct rows of each kind, int64[k] each: that no tier had, and that the device tier had not."""

    missed: npt.NDArray[np.int64]
    missed_above: npt.NDArray[np.int64]


class Levels(NamedTuple):
    """The levels of a config (device None without such a tier), bytes of a slot, and how many rows may rise in one batch."""

    device: Level | None
    host: Level
    stride: int
    most: int


def levels_of(config: StoreConfig, tables: Sequence[RecordedTable], *, rate: float = 1.0) -> Levels:
    """The levels that a store of this config would have, with its hot sets. ConfigError as from `Store.open`.

    rate: that of the `sample` that they are for: they have so much less slots, and so many fewer rows rise.
    """
    num_rows, size = sum(table.num_rows for table in tables), config.group_rows
    stride = stride_of((table.record_bytes for table in tables), config)
    begin = _sampled(beginning_of(config, num_rows), rate)
    levels = {}
    for name, tier in (("device", config.device), ("host", config.host)):
        if tier is not None:
            slots = tier.capacity // stride
            small = tier if rate == 1 or not slots else tier.model_copy(update={"capacity": scaled(slots, rate) * stride})
            levels[name] = level_of(name, small, begin.options, stride, num_rows, size)
    hot.release(levels, hot.admit(levels, begin.hot_sets))
    most = 0 if config.device is None else scaled(most_rising(config.device, stride, size), rate)
    return Levels(levels.get("device"), levels["host"], stride * size, most)


def simulate_tiers(
    config: StoreConfig, tables: Sequence[RecordedTable], trace: Trace, *, on_batch: Callable[[], object] | None = None
) -> list[TierCounts]:
    """The tiers of a config over tables of these sizes, the device's first. Rows are rows of the store.

    They begin with the config's hot sets, or empty: what an image would bring is not looked at.

    With `group_rows` what is counted are groups. on_batch: called after each batch of a stack of two. ConfigError as from
    `Store.open`, and where a batch is not whole groups.
    """
    return simulate_kinds(config, tables, trace, everything("all"), on_batch=on_batch)[0]


def simulate_kinds(
    config: StoreConfig,
    tables: Sequence[RecordedTable],
    trace: Trace,
    kinds: Kinds,
    *,
    rate: float = 1.0,
    on_batch: Callable[[], object] | None = None,
) -> tuple[list[TierCounts], ByKind]:
    """`simulate_tiers`, and misses by kind. rate: of the sample that the trace is, of which the tiers have so much less."""
    device, host, stride, most = levels_of(config, tables, rate=rate)
    trace = in_groups(trace, config.group_rows)
    if device is None:
        _, missed = host.replay(*trace, kinds.edges)
        return [_counts("host", host, stride)], ByKind(missed, missed)
    missed, found = np.zeros((2, len(kinds.names)), np.int64)
    for rows in trace.batches():
        plan = StackPlan(rows.size, above=True)
        if not plan_stack(device, host, plan, rows, 0, most, idly=True):
            assert plan.above is not None
            missed += kinds.sizes(plan.below.misses)
            found += kinds.sizes(host.slots["key"][plan.below.held[: plan.below.hits]])
            device.release(plan.above)
            host.release(plan.below)
        if on_batch is not None:
            on_batch()
    return [_counts("device", device, stride), _counts("host", host, stride)], ByKind(missed, missed + found)


def _sampled(begin: Beginning, rate: float) -> Beginning:
    """What tiers of a sample of all rows begin with."""
    if rate == 1:
        return begin
    limit = limit_of(rate)
    options = {
        name: {key: value[choose(value, limit)] if key == "hot_rows" else value for key, value in each.items()}
        for name, each in begin.options.items()
    }
    return Beginning(options, {name: rows[choose(rows, limit)] for name, rows in begin.hot_sets.items()})


def _counts(tier: str, level: Level, stride: int) -> TierCounts:
    hits, misses, bypasses = (int(level.counters[column]) for column in (HITS, MISSES, BYPASSES))
    return TierCounts(tier, level.policy.name, level.capacity, stride, Counts(hits + misses, hits, misses, bypasses))
