"""A config's tiers without bytes against the live store; sweeps in one process and in several."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiercache import ConfigError, Store
from tiercache.config import StoreConfig
from tiercache.lab.bounds import bounds, uses_of
from tiercache.lab.curves import ONLINE
from tiercache.lab.formats import load_recording
from tiercache.lab.replay import replay_live, replay_simulated, replay_tiers
from tiercache.lab.simulator import simulate
from tiercache.lab.sweep import sweep
from tiercache.lab.synthetic import shifting, zipf
from tiercache.lab.tiers import simulate_tiers
from tiercache.lab.trace import Trace
from tiercache.recording.blocks import RecordedTable

NUM_ROWS = {"a": 700, "b": 300}
TABLES = {name: np.arange(8 * count, dtype=np.uint8).reshape(count, 8) for name, count in NUM_ROWS.items()}
ABOUT = [RecordedTable(name, count, 8, "") for name, count in NUM_ROWS.items()]


def config_of(device_slots: int | None, host_slots: int, promoted: int = 3, policy: str = "s3fifo", above: str = "lru"):
    stride = 8 if device_slots is None else 16
    config: dict = {"host": {"capacity": host_slots * stride, "policy": policy}}
    if device_slots is not None:
        capacity, promotion = device_slots * stride, promoted * stride
        config["device"] = {"device": "cpu", "capacity": capacity, "promotion": promotion, "policy": above}
    return StoreConfig.load(config)


def batches_of_tables(seed: int, count: int = 120) -> Trace:
    """Batches each of one table, as rows of the store."""
    rng = np.random.default_rng(seed)
    batches = [np.empty(0, np.int64)]
    for turn in range(count):
        base, num_rows = ((0, 700), (700, 300))[turn % 2]
        batches.append(base + (rng.zipf(1.2, rng.integers(0, 60)) - 1) % num_rows)
    return Trace(np.concatenate(batches), np.cumsum([0, *map(len, batches)], dtype=np.int64))


@settings(max_examples=25)
@given(
    st.integers(0, 2**32),
    st.one_of(st.none(), st.integers(1, 80)),
    st.integers(1, 300),
    st.integers(1, 9),
    st.sampled_from(ONLINE),
    st.sampled_from(ONLINE),
)
def test_the_tiers_count_what_a_live_store_counts(
    seed: int, device_slots: int | None, host_slots: int, promoted: int, policy: str, above: str
) -> None:
    config, trace = config_of(device_slots, host_slots, promoted, policy, above), batches_of_tables(seed)
    uses = uses_of(trace)
    with Store.open(config, tables=TABLES) as store:
        seen = []
        live = replay_live(store, trace, uses, on_batch=lambda rows, records: seen.append((rows, records.copy())))
    found = replay_tiers(config, ABOUT, trace, uses)
    assert found.counts == live.counts
    assert found.device == live.device
    assert (found.tier, found.capacity, found.slot_bytes) == (policy, live.capacity, live.slot_bytes)
    assert (found.bounds, found.hits) == (live.bounds, live.hits)
    assert found.hits <= found.bounds.belady
    everything = np.concatenate(list(TABLES.values()))
    assert all(np.array_equal(records, everything[rows]) for rows, records in seen)
    assert np.array_equal(np.concatenate([rows for rows, _ in seen]), trace.rows)


def test_what_rises_is_bounded_by_the_promotion() -> None:
    trace = zipf(1000, batches=200, size=50)
    hits = [simulate_tiers(config_of(100, 400, most), ABOUT, trace)[0].counts.hits for most in (1, 50)]
    assert 0 < hits[0] < hits[1]


def test_a_recorded_run_replays_to_the_counts_of_the_run(tmp_path: Path) -> None:
    config, trace = config_of(40, 200), batches_of_tables(5)
    with Store.open(config, tables=TABLES) as store, store.record(tmp_path / "t"):
        for rows in trace.batches():
            which = int(rows.size > 0 and rows[0] >= 700)
            store.fetch(rows - (0, 700)[which], table="ab"[which])
        stats = store.stats()
    recorded = load_recording(tmp_path / "t")
    device, host = simulate_tiers(config, ABOUT, recorded)
    assert stats.device is not None
    assert device.counts[1:] == (stats.device.hits, stats.device.misses, stats.device.bypasses)
    assert host.counts[1:] == (stats.host.hits, stats.host.misses, stats.host.bypasses)
    assert host.counts.misses > 0 < device.counts.hits


def test_one_tier_is_what_the_simulator_counts() -> None:
    trace = shifting(1000, batches=300, size=40)
    (host,) = simulate_tiers(config_of(None, 77, policy="arc"), ABOUT, trace)
    assert host.counts == simulate("arc", 77, *trace)
    assert (host.tier, host.policy, host.capacity, host.slot_bytes) == ("host", "arc", 77, 8)


def test_tiers_that_hold_no_row_are_refused() -> None:
    trace = zipf(10, batches=1, size=1)
    for config, message in (
        ({"host": {"capacity": 7}}, r"host\.capacity = 7: holds no row"),
        ({"device": {"device": "cpu", "promotion": 15}}, r"device\.promotion = 15: holds no row of 16 bytes"),
    ):
        with pytest.raises(ConfigError, match=message):
            simulate_tiers(StoreConfig.load(config), ABOUT, trace)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sweep_is_each_policy_at_each_capacity(processes: int) -> None:
    trace = zipf(1000, batches=300, size=40)
    calls = []
    results = sweep(
        trace, ("lru", "s3fifo"), (10, 100), record_bytes=264, processes=processes, done=lambda: calls.append(1)
    )
    assert len(calls) == 6
    uses = uses_of(trace)
    for result, (policy, capacity) in zip(
        results, [("lru", 10), ("s3fifo", 10), ("lru", 100), ("s3fifo", 100)], strict=True
    ):
        alone = replay_simulated(policy, capacity, trace, uses, record_bytes=264)
        assert result._replace(latency_ns=alone.latency_ns) == alone
        assert result.bounds == bounds(capacity, uses)
        assert (result.reads, result.amplification) == (result.counts.misses, 0.0)
