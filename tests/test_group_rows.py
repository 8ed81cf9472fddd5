"""Groups of rows kept as one record: keys, plans, exact bytes whatever collides, faults, and everything that counts them."""

import errno
import random
import re
import threading
import time

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import ENGINES, ENGRAM, config_of, open_with, write_engram, write_rows

from tiercache import ConfigError, StorageError, Store, groups
from tiercache.config import StoreConfig
from tiercache.groups import Groups, keys_of
from tiercache.lab.bounds import uses_of
from tiercache.lab.curves import ONLINE
from tiercache.lab.formats import load_recording
from tiercache.lab.replay import replay_live, replay_tiers
from tiercache.lab.trace import Trace, in_groups
from tiercache.level import Level
from tiercache.policies import POLICIES
from tiercache.recording.blocks import RecordedTable
from tiercache.storage.memory import MemoryTable
from tiercache.testing import FaultySource, broken, oracle

NUM_ROWS = 400
RECORDS = oracle(np.arange(NUM_ROWS), 264)
SIZES = [2, 4, 8, 16]


def ngrams(seed: int, count: int, size: int = 8, num_rows: int = NUM_ROWS) -> np.ndarray:
    """Groups that share rows: the heads of n-grams in tables that are too small for them, int64[count, size]."""
    return np.random.default_rng(seed).integers(0, num_rows // size, (count, size)) + np.arange(size) * (num_rows // size)


def open_groups(size: int = 8, slots: int = 20, *, tables=None, device: int = 0, **config):
    """A store of groups over the oracle's rows, with room for so many."""
    stride = 272 if device else 264
    settings = {"group_rows": size, "host": {"capacity": slots * size * stride, **config.pop("host", {})}, **config}
    if device:
        settings["device"] = {"device": "cpu", "capacity": device * size * stride}
    return Store.open(settings, tables={"t": RECORDS} if tables is None else tables)


def exact(store, wanted, table=None, records=RECORDS) -> bool:
    return np.array_equal(store.fetch(wanted, table=table, raw=True).numpy(), records[wanted])


@pytest.fixture(params=[0, 2, 5], ids=["no bits", "two bits", "five bits"])
def few_bits(request, monkeypatch) -> int:
    """Keys of a few bits, so that most groups are another's."""
    whole = groups.keys_of
    monkeypatch.setattr(groups, "keys_of", lambda rows, size: whole(rows, size) & ((1 << request.param) - 1))
    return request.param


# keys


def reference_key(rows: list[int]) -> int:
    mask = 2**64 - 1
    total = 0
    for number, row in enumerate(rows, 1):
        x = number * 0x9E3779B97F4A7C15 & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        total = (total + row * ((x ^ (x >> 31)) | 1)) & mask
    total = ((total ^ (total >> 32)) * 0x9E3779B97F4A7C15) & mask
    return (total ^ (total >> 29)) & (2**63 - 1)


@given(st.sampled_from(SIZES), st.lists(st.integers(0, 2**62 - 1), max_size=64))
def test_a_key_is_a_hash_of_the_rows_in_their_order(size, rows):
    rows = rows[: len(rows) // size * size]
    found = keys_of(np.array(rows, np.int64), size)
    assert found.tolist() == [reference_key(rows[i : i + size]) for i in range(0, len(rows), size)]


def test_keys_of_neighbouring_groups_are_spread():
    rows = np.stack(np.unravel_index(np.arange(2**16), (16, 16, 16, 16)), 1)
    keys = keys_of(np.concatenate([rows, rows[:, ::-1] + 16], 1).reshape(-1), 8)
    assert np.unique(keys).size == keys.size
    for bits in (keys & 0xFF, keys >> 55):
        assert abs(np.bincount(bits, minlength=256) - keys.size / 256).max() < 6 * (keys.size / 256) ** 0.5


@pytest.mark.parametrize("size", SIZES)
def test_places_of_a_group_are_those_of_its_rows(size):
    found = Groups(size, 100, 10).places(np.array([0, 3, -1, -4], np.int32)).reshape(4, size)
    assert found[0].tolist() == list(range(size))
    assert found[1].tolist() == list(range(3 * size, 4 * size))
    assert (~found[2]).tolist() == list(range(size))
    assert (~found[3]).tolist() == list(range(3 * size, 4 * size))


@pytest.mark.parametrize(("num_rows", "kind"), [(2**31, np.int32), (2**31 + 1, np.int64)])
def test_row_numbers_are_as_wide_as_they_must_be(num_rows, kind):
    kept = Groups(8, num_rows, 4)
    assert kept.lower.dtype == kept.upper.dtype == kind
    level = Level(POLICIES["lru"], 4)
    last = np.arange(num_rows - 8, num_rows)
    for hits in (0, 1):
        plan = kept.room(np.tile(last, 2), above=False)
        level.plan_into(plan.below, plan.keys, 8)
        kept.settle(plan, level, served=False)
        assert (plan.below.hits, plan.below.staged) == (hits, 0)
        level.release(plan.below)
    assert kept.rows_in(plan.where[:1]).tolist() == last.tolist()


# bytes


@pytest.mark.parametrize("device", [0, 6], ids=["host", "device"])
@pytest.mark.parametrize("width", [264, 260, 8])
@pytest.mark.parametrize("size", SIZES)
def test_groups_are_exact_and_held_once(size, width, device):
    records = np.ascontiguousarray(RECORDS[:, :width])
    vocabulary = ngrams(1, 60, size)
    draw = np.random.default_rng(2)
    with open_groups(size, 30, tables={"t": records}, device=device) as store:
        for _ in range(60):
            wanted = vocabulary[draw.zipf(1.3, int(draw.integers(0, 20))) % 60]
            assert exact(store, wanted, records=records)
            store.check()
        stats = store.stats()
        assert stats.host.hits > 0 < stats.host.misses
        assert stats.host.group_rows == size
        assert f"groups of {size} rows were hits" in stats.report()
        assert stats.device is None or stats.device.hits > 0


def test_a_group_is_one_hit_and_one_miss():
    with open_groups() as store:
        wanted = ngrams(1, 3)
        assert exact(store, wanted[[0, 1, 0]])
        assert exact(store, wanted[[2, 0, 2, 1]])
        stats = store.stats()
        assert (stats.host.hits, stats.host.misses, stats.host.used_slots) == (2, 3, 3)
        assert (stats.rows, stats.fetches) == (7 * 8, 2)
        assert stats.host.curve_uses == 5
        other = np.roll(wanted[0], 1)
        assert exact(store, other)
        assert store.stats().host.misses == 4, "the same rows in another order are another group"


def test_several_tables_of_other_widths_and_kinds_share_the_tiers(tmp_path):
    engram = write_engram(tmp_path / "e.safetensors", RECORDS)
    config = config_of(write_rows(tmp_path / "t.safetensors", NUM_ROWS, 40), capacity=30 * 8 * 264)
    config["table"] += [
        {"name": "fields", "path": engram, "fields": ["weight", "scale"]},
        {"name": "resident", "path": engram, "fields": ["weight", "scale"], "resident": ["scale"]},
    ]
    narrow = oracle(np.arange(NUM_ROWS), 40)
    tables = {"file": narrow, "fields": RECORDS, "resident": RECORDS, "memory": RECORDS[:, :12].copy()}
    draw = np.random.default_rng(0)
    vocabulary = ngrams(3, 30)
    with Store.open(config | {"group_rows": 8}, tables={"memory": tables["memory"]}) as store:
        for number in range(80):
            table = ("file", "fields", "resident", "memory")[number % 4]
            wanted = vocabulary[draw.integers(0, 30, 9)]
            assert exact(store, wanted, table, tables[table])
        store.check()
        assert store.stats().host.hits > 0
        expected = ENGRAM.decode(torch.from_numpy(RECORDS[vocabulary[0]]))
        assert torch.equal(store.fetch(vocabulary[0], table="fields").nan_to_num(nan=5), expected.nan_to_num(nan=5))


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_missing_groups_share_are_read_together(tmp_path, engine):
    path = write_rows(tmp_path / "t.safetensors", NUM_ROWS, 264)
    with Store.open(config_of(path, engine=engine) | {"group_rows": 8}) as store:
        wanted = np.stack([np.arange(8), np.arange(8)[::-1], np.zeros(8, np.int64), np.arange(4, 12)])
        assert exact(store, wanted)
        assert store.stats().storage.reads == 1
        assert exact(store, wanted)
        assert store.stats().storage.reads == 1


def test_a_source_is_asked_for_each_row_once():
    asked = []

    class Source(MemoryTable):
        def read(self, rows, out):
            asked.extend(rows.tolist())
            super().read(rows, out)

    with open_groups(tables={"t": Source(RECORDS)}) as store:
        wanted = np.stack([np.arange(8), np.arange(8)[::-1], np.arange(4, 12)])
        assert exact(store, wanted)
        assert sorted(asked) == list(range(12))


def test_what_is_not_whole_groups_is_refused_before_anything_changes():
    with open_groups() as store:
        for call in (store.fetch, store.prefetch):
            with pytest.raises(ValueError, match=re.escape("indices are 9 rows; this store serves groups of 8")):
                call(range(9))
        stats = store.stats()
        assert (stats.fetches, stats.host.misses, stats.flights) == (0, 0, 0)
        assert store.fetch([]).shape == (0, 264)
        assert store.fetch(np.empty((0, 3), np.int64)).shape == (0, 3, 264)


@pytest.mark.parametrize("wrong", [0, 3, 32, "8", 8.0, True])
def test_a_size_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match="group_rows"):
        StoreConfig.load({"group_rows": wrong})


@pytest.mark.parametrize("tier", ["host", "device"])
def test_a_tier_that_holds_no_group_is_refused(tier):
    config = {"group_rows": 8, "device": {"device": "cpu"}, tier: {"device": "cpu", "capacity": 8 * 272 - 1}}
    config["host"] = {"capacity": config["host"]["capacity"]} if tier == "host" else {}
    with pytest.raises(ConfigError, match=f"{tier}.capacity = 2175: holds no group of 8 rows of 272 bytes"):
        Store.open(config, tables={"t": RECORDS})


def test_a_promotion_of_no_group_is_refused():
    config = {"group_rows": 8, "device": {"device": "cpu", "promotion": 2175}}
    with pytest.raises(ConfigError, match="promotion = 2175: holds no group of 8 rows of 272 bytes"):
        Store.open(config, tables={"t": RECORDS})


def test_a_hot_set_is_whole_groups(tmp_path):
    hot = ngrams(1, 5)
    np.save(tmp_path / "hot.npy", hot.reshape(-1))
    host = {"policy": "static", "hot_set": str(tmp_path / "hot.npy")}
    with open_groups(host=host) as store:
        assert exact(store, np.concatenate([hot, ngrams(2, 20)]))
        assert store.stats().host.used_slots == 5
        assert exact(store, hot)
        assert store.stats().host.hits == 5
    np.save(tmp_path / "hot.npy", hot.reshape(-1)[:-1])
    with pytest.raises(ConfigError, match="has 39 rows; allowed are whole groups of 8"):
        open_groups(host=host)


# keys that collide


@pytest.mark.parametrize("device", [0, 4], ids=["host", "device"])
@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_groups_of_one_key_are_exact(few_bits, policy, device):
    vocabulary = ngrams(1, 40)
    draw = np.random.default_rng(3)
    with open_groups(slots=10, device=device, host={"policy": policy}) as store:
        for number in range(200):
            wanted = vocabulary[draw.integers(0, 40, int(draw.integers(1, 12)))]
            if number % 3:
                assert exact(store, wanted)
            else:
                tickets = [(store.prefetch(each), each) for each in (wanted, wanted[::-1].copy())]
                assert exact(store, wanted)
                assert all(np.array_equal(ticket.take(raw=True).numpy(), RECORDS[each]) for ticket, each in tickets)
            store.check()
        assert store.stats().host.used_slots <= 1 << few_bits
        assert store.stats().flights == 0


def test_a_stray_is_read_each_time_and_keeps_nobody_out(few_bits):
    if few_bits:
        pytest.skip("is about keys that are all the same")
    one, other = ngrams(1, 2)
    with open_groups() as store:
        for _ in range(3):
            assert exact(store, one)
            assert exact(store, np.stack([other, one, other]))
            assert exact(store, other)
        stats = store.stats()
        assert (stats.host.used_slots, stats.host.pinned_slots, stats.host.misses) == (1, 0, 1)


# faults


@pytest.mark.parametrize("device", [0, 6], ids=["host", "device"])
def test_a_group_of_which_a_row_failed_is_forgotten(device):
    source = FaultySource(MemoryTable(RECORDS, ENGRAM))
    good, bad = np.arange(8), np.arange(8, 16)
    with open_groups(tables={"t": source}, device=device) as store:
        assert exact(store, good)
        source.errors = {11: errno.EIO}
        with pytest.raises(StorageError):
            store.fetch(np.stack([good, bad]), raw=True)
        store.check()
        assert store.stats().host.used_slots == 1
        source.errors = {}
        assert exact(store, np.stack([bad, good]))
        assert store.stats().host.used_slots == 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [8, 16])
def test_groups_whose_disk_failed_are_read_again(tmp_path, engine, size):
    path = write_engram(tmp_path / "e.safetensors", RECORDS)
    config = config_of(engine=engine) | {"group_rows": size}
    config["table"] = [{"name": "file", "path": path, "fields": ["weight", "scale"]}]
    wanted = ngrams(1, 12, size)
    with Store.open(config) as store:
        assert exact(store, wanted[:4])
        with broken(path):
            with pytest.raises(StorageError):
                store.fetch(wanted, raw=True)
            ticket = store.prefetch(wanted[6:])
            assert exact(store, wanted[:4])
            while not ticket.done:
                time.sleep(0.001)
        with pytest.raises(StorageError):
            ticket.take(raw=True)
        store.check()
        assert exact(store, wanted)
        assert exact(store, wanted)


def test_a_borrowed_group_that_failed_is_read_by_the_borrower():
    source = FaultySource(MemoryTable(RECORDS, ENGRAM))
    wanted = ngrams(1, 6)
    with open_groups(tables={"t": source}) as store:
        source.gate.clear()
        blocker = store.prefetch(wanted[4])
        source.begun.wait()
        first = store.prefetch(wanted[:4])
        second = store.prefetch(wanted[[3, 2, 5, 3]])
        assert second._flight.borrowed.size == 2
        first.cancel()
        source.gate.set()
        blocker.cancel()
        assert np.array_equal(second.take(raw=True).numpy(), RECORDS[wanted[[3, 2, 5, 3]]])
        store.check()


@pytest.mark.parametrize("raised", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", ["room", "settle", "missing", "places"])
def test_whatever_interrupts_a_call_leaves_no_slot_behind(monkeypatch, name, raised):
    original = getattr(Groups, name)
    vocabulary = ngrams(1, 30)
    for after in (False, True):
        for device in (0, 6):
            with open_groups(device=device) as store:
                store.fetch(vocabulary[:10])

                def interrupted(*args, after=after, **kwargs):
                    if after:
                        original(*args, **kwargs)
                    raise raised

                monkeypatch.setattr(Groups, name, interrupted)
                with pytest.raises(raised):
                    store.fetch(vocabulary[5:])
                monkeypatch.setattr(Groups, name, original)
                for _ in range(2):
                    assert exact(store, vocabulary)
                while store.stats().flights:
                    store.check()
                store.check()


# several callers


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("slots", [3, 40])
def test_eight_threads_at_once(tmp_path, engine, slots):
    path = write_rows(tmp_path / "t.safetensors", NUM_ROWS, 264)
    config = config_of(path, engine=engine, capacity=slots * 8 * 264) | {"group_rows": 8}
    vocabulary = ngrams(1, 60)
    wrong = []
    with Store.open(config, tables={"memory": RECORDS}) as store:

        def work(number):
            draw = np.random.default_rng(number)
            tickets = []
            for _ in range(100):
                table = ("file", "memory")[int(draw.integers(2))]
                wanted = vocabulary[draw.zipf(1.3, int(draw.integers(1, 20))) % 60]
                if draw.random() < 0.4:
                    tickets.append((store.prefetch(wanted, table=table, deadline=draw.random() / 100), wanted))
                    continue
                if tickets and draw.random() < 0.5:
                    ticket, wanted = tickets.pop(int(draw.integers(len(tickets))))
                    fetched = ticket.take(raw=True)
                else:
                    fetched = store.fetch(wanted, table=table, raw=True)
                if not np.array_equal(fetched.numpy(), RECORDS[wanted]):
                    wrong.append((number, wanted))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        store.check()
        while store.stats().flights:
            store.check()


@pytest.mark.parametrize("seed", range(8))
def test_groups_on_a_device_are_right_in_any_order_of_streams(seed):
    device = FakeDevice(random.Random(seed).randrange)
    settings = {"device": "cpu", "capacity": 272 * 8 * 6, "promotion": 272 * 8 * 2}
    draw = np.random.default_rng(seed)
    vocabulary = ngrams(seed, 30)
    results = []
    with open_with(
        "lru", {}, 272 * 8 * 12, {}, {"t": RECORDS}, device=("lru", {}, settings, device), group_rows=8
    ) as store:
        static = store.static_fetch((5, 8), raw=True)
        for number in range(60):
            wanted = vocabulary[draw.zipf(1.4, int(draw.integers(1, 8))) % 30]
            results.append((wanted, store.fetch(wanted, "abc"[number % 3], raw=True)))
            if number % 4 == 0:
                wanted = vocabulary[draw.integers(0, 30, 5)]
                static.load(wanted, "a")
                static.launch("a")
                device.run_all()
                assert np.array_equal(static.out.numpy(), RECORDS[wanted])
        static.close()
        device.run_all()
        store.check()
        assert store.stats().device.hits > 0
        with pytest.raises(ValueError, match="allowed are whole groups"):
            store.static_fetch((5, 7))
    assert not device.num_faults
    assert all(np.array_equal(found.numpy(), RECORDS[wanted]) for wanted, found in results)


# counts


TABLES = {"a": np.arange(8 * 700, dtype=np.uint8).reshape(700, 8), "b": np.arange(8 * 300, dtype=np.uint8).reshape(300, 8)}
ABOUT = [RecordedTable(name, len(table), 8, "") for name, table in TABLES.items()]


def trace_of(seed: int, size: int) -> Trace:
    """Batches of groups, each of one table, as rows of the store."""
    draw = np.random.default_rng(seed)
    words = [ngrams(seed, 80, size, 700), 700 + ngrams(seed, 80, size, 300)]
    batches = [words[turn % 2][draw.zipf(1.2, int(draw.integers(0, 12))) % 80].reshape(-1) for turn in range(100)]
    return Trace(np.concatenate(batches), np.cumsum([0, *map(len, batches)], dtype=np.int64))


@settings(max_examples=15)
@given(
    st.integers(0, 2**32),
    st.sampled_from(SIZES),
    st.one_of(st.none(), st.integers(1, 20)),
    st.integers(1, 60),
    st.sampled_from(ONLINE),
    st.sampled_from(ONLINE),
)
def test_a_simulation_counts_what_a_live_store_counts(seed, size, device_slots, host_slots, policy, above):
    stride = 8 * size if device_slots is None else 16 * size
    config = {"group_rows": size, "host": {"capacity": host_slots * stride, "policy": policy}}
    if device_slots is not None:
        settings = {"device": "cpu", "policy": above, "promotion": 3 * stride}
        config["device"] = settings | {"capacity": device_slots * stride}
    config, trace = StoreConfig.load(config), trace_of(seed, size)
    uses = uses_of(in_groups(trace, size))
    with Store.open(config, tables=TABLES) as store:
        live = replay_live(store, trace, uses)
    found = replay_tiers(config, ABOUT, trace, uses)
    assert (found.counts, found.device, found.capacity) == (live.counts, live.device, live.capacity)
    assert (found.slot_bytes, found.bytes_missed, found.bounds) == (stride, live.bytes_missed, live.bounds)
    assert found.bytes_missed == found.reads * 8 == found.counts.misses * size * 8
    assert found.hits <= found.bounds.belady


def test_a_batch_of_half_a_group_is_no_trace_of_groups():
    with pytest.raises(ConfigError, match="group_rows = 8: batch 1 of the trace has 12 rows, not whole groups"):
        in_groups(Trace(np.arange(20), np.array([0, 8, 20])), 8)


def test_rows_are_recorded_as_rows(tmp_path):
    wanted = ngrams(1, 5)
    with open_groups() as store, store.record(tmp_path / "r"):
        store.fetch(wanted)
        store.fetch(wanted)
    recorded = load_recording(tmp_path / "r")
    assert np.array_equal(recorded.rows, np.tile(wanted.reshape(-1), 2))


def test_books_are_a_fraction_of_those_of_rows():
    books = []
    for size in (1, 8):
        config = {"group_rows": size, "host": {"capacity": 400_000 * 8}}
        with Store.open(config, tables={"t": np.zeros((10**7, 8), np.uint8)}) as store:
            stats = store.stats().host
            assert stats.capacity_slots * size == 400_000
            books.append(stats.bookkeeping_bytes)
    assert 4 * 400_000 < books[1] < 0.3 * books[0]


def test_images_of_groups_are_refused(tmp_path):
    config = config_of(write_rows(tmp_path / "t.safetensors", NUM_ROWS, 264)) | {"group_rows": 8}
    with Store.open(config) as store, pytest.raises(ConfigError, match="save: the tiers hold groups of 8 rows"):
        store.save(tmp_path / "image")
    assert not (tmp_path / "image").exists()
    with pytest.raises(ConfigError, match=r"restore = .*: the tiers hold groups of 8 rows"):
        Store.open(config | {"restore": str(tmp_path / "image")})
