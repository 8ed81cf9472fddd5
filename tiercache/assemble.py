"""From a config's tiers to levels, from levels to counts, and what a recording says of the tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.config import StoreConfig, TierConfig
from tiercache.curve import Curve
from tiercache.errors import ConfigError
from tiercache.level import BYPASSES, HITS, MISSES, PINNED, Level
from tiercache.policies import POLICIES
from tiercache.recording.blocks import RecordedTable
from tiercache.request import Table
from tiercache.stats import LevelStats, device_pays, host_pays
from tiercache.storage.memory import read_rows
from tiercache.storage.table import FileTable
from tiercache.tiers import DeviceTier
from tiercache.tiers.host import HostTier


def level_of(
    tier: str, config: TierConfig, options: Mapping[str, Mapping[str, Any]], stride: int, num_rows: int
) -> Level:
    """The books of a tier: as many slots as fit its bytes, and never more than there are rows.

    ConfigError where not one fits, or the policy does not take these parameters.
    """
    if config.capacity < stride:
        raise ConfigError(
            f"{tier}.capacity = {config.capacity}: holds no row of {stride} bytes; allowed are {stride} bytes or more"
        )
    capacity = min(config.capacity // stride, num_rows, 2**30)
    try:
        level = Level(POLICIES[config.policy], capacity, options[tier], num_rows)
    except (TypeError, ValueError) as error:
        given = {name: value for name, value in options[tier].items() if not isinstance(value, np.ndarray)}
        takes = ", ".join(POLICIES[config.policy].parameters) or "no options"
        message = f"{tier}.policy_options = {given}: policy {config.policy!r} refuses them: {error}; it takes {takes}"
        raise ConfigError(message) from error
    level.watch(Curve(capacity))
    return level


class Beginning(NamedTuple):
    """What a config's tiers begin with, by name: the parameters of their policies, and the hot sets that are read at open."""

    options: dict[str, dict[str, Any]]
    hot_sets: dict[str, npt.NDArray[np.int64]]


def beginning_of(config: StoreConfig, num_rows: int) -> Beginning:
    """What the tiers of a config begin with over tables of `num_rows` rows. Errors are those of `hot_rows_of`.

    The hot set of policy "static" is its parameter: it keeps these rows and no others, each from its first use on.
    """
    begin = Beginning({}, {})
    for name, tier in (("device", config.device), ("host", config.host)):
        if tier is None:
            continue
        begin.options[name] = dict(tier.policy_options)
        if tier.hot_set is not None:
            rows = hot_rows_of(name, tier.hot_set, num_rows)
            if tier.policy == "static":
                begin.options[name]["hot_rows"] = rows
            else:
                begin.hot_sets[name] = rows
    return begin


def hot_rows_of(tier: str, path: Path, num_rows: int) -> npt.NDArray[np.int64]:
    """Rows of a tier's hot set, int64[n]. ConfigError where one is none of the store's, or is there twice; FormatError where
    the file is no list of rows, StorageError where it cannot be read.
    """
    rows = read_rows(path)
    where = f"{tier}.hot_set = {str(path)!r}"
    wrong = (rows < 0) | (rows >= num_rows)
    if wrong.any():
        at = int(wrong.argmax())
        raise ConfigError(f"{where}: at position {at} is row {rows[at]}; allowed are rows 0 to {num_rows - 1}")
    _, first = np.unique(rows, return_index=True)
    if first.size < rows.size:
        again = np.ones(rows.size, bool)
        again[first] = False
        at = int(again.argmax())
        raise ConfigError(f"{where}: at position {at} row {rows[at]} is there again; allowed is each row once")
    return rows


def stats_of(tier: HostTier | DeviceTier, row_ns: float) -> LevelStats:
    """Counts of a tier; row_ns: see StoreStats. Under the lock."""
    level, counters = tier.level, tier.level.counters
    level.take_notes()
    hits, misses, bypasses = (int(counters[column]) for column in (HITS, MISSES, BYPASSES))
    if isinstance(tier, HostTier):
        pays, why = host_pays(hits, misses, level.capacity, row_ns)
    else:
        pays, why = device_pays(hits, misses - bypasses, hits + misses, level.capacity)
    curve = level.curve
    return LevelStats(
        policy=level.policy.name,
        capacity_slots=level.capacity,
        capacity_bytes=tier.capacity_bytes,
        bookkeeping_bytes=level.nbytes,
        used_slots=int(np.count_nonzero(level.slots["key"] >= 0)),
        pinned_slots=int(counters[PINNED]),
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
