"""From a config's tiers to levels, from levels to counts, and what a recording says of the tables."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tiercache.config import DeviceConfig, StoreConfig, TierConfig
from tiercache.curve import Curve
from tiercache.errors import ConfigError
from tiercache.groups import keys_of
from tiercache.level import BYPASSES, HITS, MISSES, PINNED, Level
from tiercache.policies import POLICIES
from tiercache.recording.blocks import RecordedTable
from tiercache.request import Table
from tiercache.stats import LevelStats, device_pays, host_pays
from tiercache.storage.memory import read_rows
from tiercache.storage.table import FileTable
from tiercache.tiers import DeviceTier
from tiercache.tiers.host import HostTier


def stride_of(record_bytes: Iterable[int], config: StoreConfig) -> int:
    """Bytes between the records of the tiers, for records of so many bytes."""
    unit = 8 if config.device is None else 16
    return -(-max(record_bytes) // unit) * unit


def level_of(
    tier: str,
    config: TierConfig,
    options: Mapping[str, Mapping[str, Any]],
    stride: int,
    num_rows: int,
    group_rows: int = 1,
) -> Level:
    """The books of a tier: as many slots as fit its bytes, and never more than there are rows. stride: of records.

    ConfigError where not one fits, or the policy does not take these parameters.
    """
    slot_bytes = stride * group_rows
    if config.capacity < slot_bytes:
        what = f"row of {stride} bytes" if group_rows == 1 else f"group of {group_rows} rows of {stride} bytes"
        raise ConfigError(
            f"{tier}.capacity = {config.capacity}: holds no {what}; allowed are {slot_bytes} bytes or more"
        )
    capacity = min(config.capacity // slot_bytes, num_rows if group_rows == 1 else 2**30, 2**30 // group_rows)
    try:
        level = Level(POLICIES[config.policy], capacity, options[tier], num_rows if group_rows == 1 else None)
    except (TypeError, ValueError) as error:
        given = {name: value for name, value in options[tier].items() if not isinstance(value, np.ndarray)}
        takes = ", ".join(POLICIES[config.policy].parameters) or "no options"
        message = f"{tier}.policy_options = {given}: policy {config.policy!r} refuses them: {error}; it takes {takes}"
        raise ConfigError(message) from error
    level.watch(Curve(capacity))
    return level


def most_rising(config: DeviceConfig, stride: int, group_rows: int) -> int:
    """Slots that may rise in one batch. ConfigError where not one may. stride: of records."""
    slot_bytes = stride * group_rows
    if config.promotion < slot_bytes:
        what = f"row of {stride} bytes" if group_rows == 1 else f"group of {group_rows} rows of {stride} bytes"
        raise ConfigError(
            f"device.promotion = {config.promotion}: holds no {what}; allowed are {slot_bytes} bytes or more"
        )
    return config.promotion // slot_bytes


def options_of(tier: str, config: TierConfig, num_rows: int, group_rows: int = 1) -> dict[str, Any]:
    """Parameters of a tier's policy. ConfigError where a row of its hot set is none of the store's: it is of other tables."""
    options: dict[str, Any] = dict(config.policy_options)
    if config.hot_set is not None:
        rows = read_rows(config.hot_set)
        wrong = rows[(rows < 0) | (rows >= num_rows)]
        if wrong.size:
            path = str(config.hot_set)
            raise ConfigError(f"{tier}.hot_set = {path!r}: has row {wrong[0]}; allowed are rows 0 to {num_rows - 1}")
        if rows.size % group_rows:
            path = str(config.hot_set)
            raise ConfigError(f"{tier}.hot_set = {path!r}: has {rows.size} rows; allowed are whole groups of {group_rows}")
        options["hot_rows"] = rows if group_rows == 1 else keys_of(rows, group_rows)
    return options


def stats_of(tier: HostTier | DeviceTier, row_ns: float) -> LevelStats:
    """Counts of a tier; row_ns: see StoreStats. Under the lock."""
    level, counters = tier.level, tier.level.counters
    level.take_notes()
    hits, misses, bypasses = (int(counters[column]) for column in (HITS, MISSES, BYPASSES))
    group_rows = tier.groups.size if tier.groups else 1
    if isinstance(tier, HostTier):
        pays, why = host_pays(hits, misses, level.capacity, row_ns, group_rows)
    else:
        pays, why = device_pays(hits, misses - bypasses, hits + misses, level.capacity)
    curve = level.curve
    return LevelStats(
        policy=level.policy.name,
        capacity_slots=level.capacity,
        capacity_bytes=tier.capacity_bytes,
        bookkeeping_bytes=level.nbytes + (0 if tier.members is None else tier.members.nbytes),
        used_slots=int(np.count_nonzero(level.slots["key"] >= 0)),
        pinned_slots=int(counters[PINNED]),
        group_rows=group_rows,
        hits=hits,
        misses=misses,
        bypasses=bypasses,
        curve=curve.points(hits + misses) if curve else (),
        curve_uses=curve.num_uses if curve else 0,
        pays=pays,
        why=why,
    )


def recorded_tables(tables: Mapping[str, Table], files: Mapping[str, FileTable]) -> list[RecordedTable]:
    """What a recording says of a store's tables, in the order of their rows. files: those of them that are on disk."""
    return [
        RecordedTable(name, table.num_rows, table.record.record_bytes, files[name].identity if name in files else "")
        for name, table in tables.items()
    ]
