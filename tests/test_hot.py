"""Hot sets: the next store begins with the rows that the last one held, byte for byte, whatever its policy and its tables."""

import errno
import os
from contextlib import contextmanager
from random import Random

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import config_of, descriptors_of, is_exact, store_threads, write_rows

from tiercache import ClosedError, ConfigError, FormatError, StorageError, Store, hot
from tiercache.config import StoreConfig
from tiercache.lab import synthetic
from tiercache.lab.tiers import simulate_tiers
from tiercache.lab.trace import Trace
from tiercache.level import PINNED, Level, unpin
from tiercache.policies import POLICIES
from tiercache.records import plain
from tiercache.storage import open_table
from tiercache.storage.pack import pack
from tiercache.storage.reader import FileReader
from tiercache.testing import oracle
from tiercache.warm import begin_with

NUM_ROWS = 2000
ONLINE = sorted(set(POLICIES) - {"static", "belady"})


@pytest.fixture
def table(tmp_path):
    return write_rows(tmp_path / "t.safetensors", NUM_ROWS, 264)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hot.npy"


def beginning_with(table, path, rows, *, capacity=300, policy="lru", **sections):
    """A store over the table whose host tier of so many slots begins with these rows."""
    np.save(path, np.asarray(rows, np.int64))
    host = {"capacity": 264 * capacity, "policy": policy, "hot_set": path}
    return Store.open({**config_of(table), "host": host, **sections})


def rows_held(tier):
    keys = tier.level.slots["key"]
    return set(keys[keys >= 0].tolist())


@contextmanager
def no_reads(store):
    before = store.stats().storage.reads
    yield
    assert store.stats().storage.reads == before


@pytest.mark.parametrize("policy", ONLINE)
def test_every_policy_begins_with_what_the_last_store_held(table, path, policy):
    host = {"capacity": 264 * 64, "policy": policy}
    random = np.random.default_rng(3)
    with Store.open({**config_of(table), "host": host}) as store:
        for _ in range(40):
            store.fetch(random.zipf(1.3, 20) % NUM_ROWS)
        held = rows_held(store._host)
        assert store.save_hot_set(path) == len(held)
    rows = np.load(path)
    assert (rows.dtype, set(rows.tolist())) == (np.int64, held)
    with Store.open({**config_of(table), "host": {**host, "hot_set": path}}) as store:
        stats = store.stats()
        assert [each[:2] for each in stats.hot_sets] == [("host", len(held))]
        assert (stats.host.hits, stats.host.misses, stats.host.pinned_slots) == (0, 0, 0)
        assert rows_held(store._host) == held
        with no_reads(store):
            assert is_exact(store, rows)
        store.check()
        for _ in range(40):
            assert is_exact(store, random.zipf(1.3, 20) % NUM_ROWS)
        store.check()


@pytest.mark.parametrize("policy", ONLINE)
def test_no_row_of_a_set_drops_another_and_the_hottest_have_room(table, path, policy):
    rows = np.random.default_rng(1).permutation(NUM_ROWS)
    with beginning_with(table, path, rows, capacity=50, policy=policy) as store:
        assert rows_held(store._host) == set(rows[:50].tolist())
        with no_reads(store):
            assert is_exact(store, rows[:50])
        store.check()


def test_the_hottest_row_is_the_newest(table, path):
    with beginning_with(table, path, [7, 3, 9, 1], capacity=4) as store:
        for row, dropped in ((100, 1), (101, 9), (102, 3), (103, 7)):
            store.fetch([row])
            assert dropped not in rows_held(store._host)
            assert len(rows_held(store._host)) == 4


def test_rows_are_saved_those_first_that_were_used_last(table, path):
    with Store.open({**config_of(table), "host": {"capacity": 264 * 8, "policy": "lru"}}) as store:
        for rows in ([5], [6, 8], [7], [5], [1]):
            store.fetch(rows)
        assert store.save_hot_set(path) == 5
        first = np.load(path)
    assert first[:3].tolist() == [1, 5, 7]
    assert set(first[3:].tolist()) == {6, 8}
    with beginning_with(table, path, first, capacity=8) as store:
        store.save_hot_set(path)
    assert np.array_equal(np.load(path), first), "a store that begins with a hot set saves it as it was"


@pytest.mark.parametrize("engine", ["threads", "uring"])
def test_pages_are_verified_and_pieces_follow_one_another(table, path, tmp_path, monkeypatch, engine):
    monkeypatch.setattr(hot, "_PIECE_BYTES", 264 * 13)
    pack(table, tmp_path / "packed")
    rows = np.random.default_rng(2).permutation(NUM_ROWS)[:300]
    np.save(path, rows)
    config = config_of(tmp_path / "packed", engine=engine, verify="page") | {"host": {"capacity": 1 << 20, "hot_set": path}}
    with Store.open(config) as store, no_reads(store):
        assert is_exact(store, rows)


@pytest.mark.parametrize("kind", ["cpu", "streams"])
def test_the_device_tier_takes_the_first_rows_and_the_host_tier_the_next(table, path, kind, monkeypatch):
    monkeypatch.setattr(hot, "_PIECE_BYTES", 272 * 13)
    rows = np.random.default_rng(2).permutation(NUM_ROWS)[:400]
    settings, fake = {"capacity": 272 * 30, "device": "cpu"}, None
    if kind == "cpu":
        np.save(path, rows)
        sections = {"device": {**settings, "hot_set": path}, "host": {"capacity": 272 * 100, "hot_set": path}}
        store = Store.open({**config_of(table), **sections})
    else:
        fake = FakeDevice(Random(4).randrange)
        store = open_device_store(table, settings, fake, {"device": rows, "host": rows})
    with store:
        assert [each[:2] for each in store.stats().hot_sets] == [("device", 30), ("host", 100)]
        assert rows_held(store._device) == set(rows[:30].tolist())
        assert rows_held(store._host) == set(rows[30:130].tolist())
        with no_reads(store):
            out = store.fetch(rows[:130], raw=True)
            if fake is not None:
                fake.run_all()
            assert torch.equal(out, torch.from_numpy(oracle(rows[:130], 264)))
        assert store.stats().device.hits == 30
        assert store.save_hot_set(path) >= 130
        assert set(np.load(path)[:30].tolist()) == rows_held(store._device)
        store.check()


def open_device_store(table, settings, fake, hot_sets):
    """A store with a fake device, whose tiers begin with hot sets."""
    config = StoreConfig.load({**config_of(table), "device": settings, "host": {"capacity": 272 * 100}})
    return Store(config, {"file": open_table("file", table)}, {"device": {}, "host": {}}, fake, hot_sets)


def test_a_hot_set_of_one_tier_leaves_the_other_empty(table, path):
    np.save(path, np.arange(40))
    device = {"device": "cpu", "capacity": 272 * 10}
    for upper, lower in (({}, {"hot_set": path}), ({"hot_set": path}, {})):
        with Store.open({**config_of(table), "device": device | upper, "host": {"capacity": 272 * 100} | lower}) as store:
            stats = store.stats()
            assert (stats.device.used_slots, stats.host.used_slots) == (10 if upper else 0, 40 if lower else 0)
            assert is_exact(store, range(50))
            store.check()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 60), st.sampled_from(ONLINE), st.data(),
    st.booleans(),
)  # fmt: skip
def test_sources_of_any_shape_begin_with_any_set(path, sizes, capacity, policy, data, device):
    widths = [8 * (number + 1) for number in range(len(sizes))]
    tables = {f"t{width}": oracle(np.arange(size), width) for size, width in zip(sizes, widths, strict=True)}
    rows = data.draw(st.lists(st.integers(0, sum(sizes) - 1), unique=True, max_size=60))
    np.save(path, np.array(rows, np.uint16))
    stride = -(-max(widths) // 16) * 16 if device else max(widths)
    config = {"host": {"capacity": capacity * stride, "policy": policy, "hot_set": path}}
    if device:
        config["device"] = {"device": "cpu", "capacity": 3 * stride, "policy": policy, "hot_set": path}
    with Store.open(config, tables=tables) as store:
        upper = len(rows_held(store._device)) if device else 0
        assert upper == (min(3, sum(sizes), len(rows)) if device else 0)
        held = rows_held(store._host)
        assert held == set(rows[upper : upper + min(capacity, sum(sizes))])
        store.check()
        for name, content in tables.items():
            assert np.array_equal(store.fetch(range(len(content)), table=name, raw=True).numpy(), content)
        store.check()


def test_static_keeps_its_set_and_reads_each_row_at_its_first_use(table, path):
    with beginning_with(table, path, [3, 7], policy="static") as store:
        assert store.stats().hot_sets == ()
        assert store.stats().host.used_slots == 0
        store.fetch(range(10))
        assert rows_held(store._host) == {3, 7}
        assert store.save_hot_set(path) == 2


@pytest.mark.filterwarnings("ignore:tiercache. restore. nothing is at")
def test_an_image_comes_before_a_hot_set_and_a_hot_set_before_nothing(table, path, tmp_path):
    image = tmp_path / "tiers"
    with beginning_with(table, path, range(10), restore=str(image)) as store:
        assert rows_held(store._host) == set(range(10))
        store.fetch(range(100, 120))
        store.save(image)
    with beginning_with(table, path, range(500, 510), restore=str(image)) as store:
        assert rows_held(store._host) == {*range(10), *range(100, 120)}
        assert store.stats().hot_sets == ()


def test_the_lab_counts_what_a_store_that_begins_with_a_hot_set_counts(table, path):
    batches = [np.random.default_rng(seed).zipf(1.2, 30) % NUM_ROWS for seed in range(50)]
    trace = Trace(np.concatenate(batches), np.arange(51) * 30)
    np.save(path, np.random.default_rng(0).permutation(NUM_ROWS)[:200])
    host = {"capacity": 272 * 100, "hot_set": path}
    for sections in ({"host": host}, {"host": host, "device": {"device": "cpu", "capacity": 272 * 20, "hot_set": path}}):
        with Store.open({**config_of(table), **sections}) as store:
            for batch in batches:
                store.fetch(batch)
            stats, about = store.stats(), store.recorded_tables()
        counted = simulate_tiers(StoreConfig.load({**config_of(table), **sections}), about, trace)
        live = [tier for tier in (stats.device, stats.host) if tier is not None]
        assert [(tier.counts.hits, tier.counts.misses) for tier in counted] == [(tier.hits, tier.misses) for tier in live]


class Failing:
    """A source whose reads fail."""

    record = plain("U8", 8)
    num_rows = 100

    def __init__(self, error):
        self.error, self.closed = error, 0

    def read(self, rows, out):
        raise self.error

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "gone"), StorageError(errno.EIO, "gone", "where")])
def test_a_read_that_fails_closes_everything(table, path, error):
    source = Failing(error)
    np.save(path, [1, 2, NUM_ROWS + 5])
    with pytest.raises(StorageError, match="gone"):
        Store.open({**config_of(table), "host": {"capacity": 8000, "hot_set": path}}, tables={"source": source})
    assert (source.closed, store_threads(), descriptors_of(table)) == (1, [], 0)


def test_a_call_that_is_interrupted_while_it_loads_closes_everything(table, path, monkeypatch):
    submit = FileReader.submit
    calls = []

    def interrupt(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return submit(self, *arguments)

    monkeypatch.setattr(hot, "_PIECE_BYTES", 264 * 13)
    monkeypatch.setattr(FileReader, "submit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        beginning_with(table, path, range(100))
    assert (store_threads(), descriptors_of(table)) == ([], 0)


def test_a_table_that_was_cut_is_told(table, path, monkeypatch):
    admit = hot.admit

    def cut(*arguments):
        os.truncate(table, 1000)
        return admit(*arguments)

    monkeypatch.setattr(hot, "admit", cut)
    with pytest.raises(StorageError, match=r"t\.safetensors"):
        beginning_with(table, path, range(100))
    assert (store_threads(), descriptors_of(table)) == ([], 0)


def test_what_is_no_hot_set_is_not_overwritten(table, path, tmp_path):
    with Store.open(config_of(table)) as store:
        path.write_bytes(b"mine")
        with pytest.raises(StorageError, match="something else than a hot set"):
            store.save_hot_set(path)
        assert path.read_bytes() == b"mine"
        with pytest.raises(StorageError, match="a directory; a hot set is a file"):
            store.save_hot_set(tmp_path)
        with pytest.raises(StorageError):
            store.save_hot_set(tmp_path / "none" / "hot.npy")
        path.unlink()
        assert store.save_hot_set(path) == 0
        store.fetch([5])
        assert store.save_hot_set(path) == 1
    assert np.load(path).tolist() == [5]
    assert sorted(os.listdir(tmp_path)) == ["hot.npy", "t.safetensors"]
    with pytest.raises(ClosedError):
        store.save_hot_set(path)


def test_a_save_that_fails_leaves_the_old_set(table, path, tmp_path, monkeypatch):
    with beginning_with(table, path, [1, 2]) as store:
        def full(file, array):
            file.write(b"x")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(np, "save", full)
        with pytest.raises(StorageError, match="No space left"):
            store.save_hot_set(path)
    assert np.load(path).tolist() == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["hot.npy", "t.safetensors"]


def test_a_set_of_no_rows_and_a_wrong_one_on_the_device(table, path):
    with beginning_with(table, path, []) as store:
        assert store.stats().hot_sets[0][:2] == ("host", 0)
        assert store._host.level.counters[PINNED] == 0
    np.save(path, [NUM_ROWS])
    with pytest.raises(ConfigError, match=r"device\.hot_set = .*position 0"):
        Store.open({**config_of(table), "device": {"device": "cpu", "capacity": 8000, "hot_set": path}})

def test_a_set_that_cannot_be_read_is_named_with_its_field(table, path):
    def begin():
        Store.open({**config_of(table), "host": {"capacity": 8000, "hot_set": path}})

    with pytest.raises(StorageError, match=rf"host\.hot_set: No such file.*{path.name}") as raised:
        begin()
    assert (raised.value.errno, raised.value.filename) == (errno.ENOENT, str(path))
    np.save(path, np.array([1, 2**64 - 1], np.uint64))
    with pytest.raises(FormatError, match=rf"host\.hot_set: {path}: has row {2**64 - 1}; allowed are rows below 2\*\*63"):
        begin()
    path.write_text("1\n2\n")
    with pytest.raises(FormatError, match=rf"^host\.hot_set: {path}: not a whole .npy file; allowed is"):
        begin()


def test_gittins_ranks_hot_rows_until_they_are_used():
    level = Level(POLICIES["gittins"], 300)
    slots = begin_with(level, np.arange(224, -1, -1))
    ranks, given = level.state.words[slots[::-1]] >> 2, level.state.words[slots] & 3
    assert (given == 2).all()
    assert ranks[:5].tolist() == [15, 14, 14, 14, 13]
    assert (np.diff(ranks.astype(int)) <= 0).all()
    assert np.bincount(ranks)[1] == np.count_nonzero(np.sqrt(np.arange(225) / 225) >= 14 / 15)
    level.release(level.plan(np.array([0, 500])))
    assert level.state.words[slots[-1]] >> 2 & 15 == 2, "it was used for the second time"
    level.check()


@pytest.mark.parametrize("capacity", [1, 5, 60, 120, 500])
def test_hot_rows_that_nobody_uses_leave(capacity):
    level = Level(POLICIES["gittins"], capacity)
    begin_with(level, np.arange(50_000, 50_000 + capacity))
    unpin(level.slots, level.counters, np.arange(capacity, dtype=np.int32))
    level.replay(*synthetic.zipf(50_000, batches=25_000, size=20, exponent=0.4, seed=1))
    assert (level.slots["key"] < 50_000).all()


@pytest.mark.parametrize("order", ["most used", "last used"])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_hot_set_of_the_past_serves_what_comes(share, order):
    """The rows that the first halves of some traces used most, or last: much better than begun empty, and not worse than taken
    for newcomers.
    """
    hits = np.zeros((3, 2), np.int64)
    for seed in range(5, 8):
        rows, _ = synthetic.zipf(20_000, batches=4000, size=50, exponent=0.9, seed=seed)
        past, ahead = rows[:100_000], Trace(rows[100_000:], np.arange(0, 100_001, 50))
        again, first = np.unique(past[::-1], return_index=True)
        used = np.bincount(past, minlength=20_000)
        hottest = np.argsort(-used, kind="stable") if order == "most used" else again[np.argsort(first)]
        for number, begun in enumerate(("ranked", "newcomers", "empty")):
            policy = POLICIES["gittins"] if begun == "ranked" else POLICIES["gittins"]._replace(rank=None)
            level = Level(policy, int(20_000 * share))
            if begun != "empty":
                hot.release({"host": level}, hot.admit({"host": level}, {"host": hottest}))
            per_batch, _ = level.replay(*ahead)
            hits[number] += per_batch[:500].sum(), per_batch[500:].sum()
    ranked, newcomers, empty = hits
    assert ranked.sum() > newcomers.sum() * (1 if order == "most used" else 0.995)
    assert ranked[0] > 1.04 * empty[0]
    assert ranked[1] > empty[1]
