"""From a config's tiers to levels, from levels to counts, and what a recording says of the tables."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.config import DeviceConfig, StoreConfig, TierConfig
from tiercache.curve import Curve
from tiercache.errors import ConfigError, FormatError, StorageError
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
    capacity = min(config.capacity // slot_bytes, num_rows, 2**30 // group_rows)
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


class Beginning(NamedTuple):
    """What a config's tiers begin with, by name: the parameters of their policies, and the hot sets that are read at open."""

    options: dict[str, dict[str, Any]]
    hot_sets: dict[str, npt.NDArray[np.int64]]


def beginning_of(config: StoreConfig, num_rows: int) -> Beginning:
    """What the tiers of a config begin with over tables of `num_rows` rows. Errors are those of `hot_rows_of`.

    The hot set of policy "static" is its parameter: it keeps these rows and no others, each from its first use on. With
    `group_rows` it is whole groups, and the only one: ConfigError for a hot set that is to be read at open.
    """
    begin, size = Beginning({}, {}), config.group_rows
    for name, tier in (("device", config.device), ("host", config.host)):
        if tier is None:
            continue
        begin.options[name] = dict(tier.policy_options)
        if tier.hot_set is None:
            continue
        rows = hot_rows_of(name, tier.hot_set, num_rows, size)
        if tier.policy == "static":
            begin.options[name]["hot_rows"] = rows if size == 1 else keys_of(rows, size)
        elif size == 1:
            begin.hot_sets[name] = rows
        else:
            raise ConfigError(
                f"{name}.hot_set = {str(tier.hot_set)!r}: the tiers hold groups of {size} rows; allowed is group_rows = 1, "
                'or policy = "static"'
            )
    return begin


def hot_rows_of(tier: str, path: Path, num_rows: int, group_rows: int) -> npt.NDArray[np.int64]:
    """Rows of a tier's hot set, int64[n]. ConfigError where one is none of the store's, or where rows or groups are there twice
    or not whole; FormatError where the file is no list of rows, StorageError where it cannot be read.
    """
    where = f"{tier}.hot_set = {str(path)!r}"
    try:
        rows = read_rows(path)
    except StorageError as error:
        raise StorageError(error.errno, f"{tier}.hot_set: {error.strerror}", str(path)) from error
    except FormatError as error:
        raise FormatError(f"{tier}.hot_set: {error}") from error
    wrong = (rows < 0) | (rows >= num_rows)
    if wrong.any():
        at = int(wrong.argmax())
        raise ConfigError(f"{where}: at position {at} is row {rows[at]}; allowed are rows 0 to {num_rows - 1}")
    if rows.size % group_rows:
        raise ConfigError(f"{where}: has {rows.size} rows; allowed are whole groups of {group_rows}")
    entries = rows.reshape(-1, group_rows)
    _, first = np.unique(entries, axis=0, return_index=True)
    if first.size < len(entries):
        again = np.ones(len(entries), bool)
        again[first] = False
        at = int(again.argmax()) * group_rows
        what = f"row {rows[at]}" if group_rows == 1 else f"the group of row {rows[at]}"
        raise ConfigError(f"{where}: at position {at} {what} is there again; allowed is each once")
    return rows


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
