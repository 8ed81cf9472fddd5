"""The curve of a tier against a list, its notes, what a live store says of its tiers, and the verdicts."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache import Store
from tiercache.curve import LIMIT, NOTED, Curve
from tiercache.lab.sampling import lru_curve, sample
from tiercache.level import HITS, MISSES, Level
from tiercache.policies import POLICIES
from tiercache.stats import BOOKS_NS, device_pays, host_pays

batches_of_rows = st.lists(st.lists(st.integers(0, 90), max_size=30), max_size=25)


def chosen(row, rate):
    """Whether a row is watched."""
    return row % 2**32 * 0x4F1BBCD9 % 2**32 < round(rate * 2**32)


class Model:
    """The watched rows in a list, the newest first."""

    def __init__(self, sizes, rate):
        self.edges = [max(1, round(size * rate)) for size in sizes]
        self.rate = rate
        self.rows = []
        self.hits = [0] * len(sizes)
        self.uses = 0

    def plan(self, rows):
        """Each row once, unless it falls behind the largest size before the batch ends: what is forgotten is new again."""
        used = set()
        for row in rows:
            if not chosen(row, self.rate) or (row in used and row in self.rows):
                continue
            used.add(row)
            self.uses += 1
            if row in self.rows:
                place = self.rows.index(row)
                self.hits = [hits + (place < edge) for hits, edge in zip(self.hits, self.edges, strict=True)]
                del self.rows[place]
            self.rows.insert(0, row)
            del self.rows[max(self.edges) :]

    def points(self, accesses):
        expected = accesses * self.rate
        if not expected:
            return [0.0] * len(self.hits)
        return [min(max((hits + expected - self.uses) / expected, 0), 1) for hits in self.hits]


def watched_level(policy, capacity, watched=None):
    level = Level(POLICIES[policy], capacity)
    level.watch(Curve(capacity, watched))
    return level


def plan_all(level, batches):
    for batch in batches:
        level.release(level.plan(np.array(batch, np.int64)))
    level.take_notes()


def skewed(num_batches, num_rows, seed=0, size=400):
    rng = np.random.default_rng(seed)
    return [((rng.zipf(1.3, rng.integers(1, size)) - 1) % num_rows).tolist() for _ in range(num_batches)]


@given(st.integers(1, 40), st.none() | st.integers(1, 12), batches_of_rows)
def test_a_curve_is_what_a_list_of_the_watched_rows_says(capacity, watched, batches):
    level = watched_level("s3fifo", capacity, watched)
    model = Model(level.curve.sizes, level.curve.rate)
    plan_all(level, batches)
    for batch in batches:
        model.plan(batch)
    accesses = int(level.counters[HITS] + level.counters[MISSES])
    assert level.curve.num_uses == model.uses
    assert [point.hit_rate for point in level.curve.points(accesses)] == pytest.approx(model.points(accesses))


def test_batches_with_more_watched_rows_than_notes_have_room_are_watched_whole():
    level = watched_level("lru", 600, watched=500)
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, 3000, size).tolist() for size in (5000, 3, 700, 64, 65, 1, 4000, 2000)]
    batches += [[7] * 3000 + [8] * 10, [8] * 700 + [7]]
    model = Model(level.curve.sizes, level.curve.rate)
    plan_all(level, batches)
    for batch in batches:
        model.plan(batch)
    hits = np.cumsum(level.curve.watched.uses[:-1]).tolist()
    assert hits == model.hits
    assert level.curve.num_uses == model.uses > 4000


def test_a_curve_of_every_row_is_lru_itself():
    batches = [[row] for batch in skewed(30, 300) for row in batch]
    level = watched_level("sieve", 40)
    assert level.curve.rate == 1.0
    plan_all(level, batches)
    rows = np.array(batches).ravel()
    points = level.curve.points(rows.size)
    assert [point.capacity_slots for point in points] == [5, 10, 20, 40, 80, 160, 320]
    exact = lru_curve(rows)
    assert [point.hit_rate for point in points] == pytest.approx(exact.hit_rate([5, 10, 20, 40, 80, 160, 320]).tolist())


def test_a_curve_online_is_the_curve_of_the_same_sample_offline():
    rows = np.concatenate([np.array(batch, np.int64) for batch in skewed(400, 40_000)])
    level = watched_level("fifo", 4000)
    offsets = np.arange(rows.size + 1)
    for start in range(0, rows.size, 1000):
        plan_all(level, rows[start : start + 1000, None].tolist())
    rate = level.curve.rate
    assert rate == pytest.approx(64 / 4000)
    offline = lru_curve(rows, rate=rate)
    assert level.curve.num_uses == sample(rows, offsets, rate=rate).rows.size > 200
    scaled = [max(1, round(size * rate)) for size in level.curve.sizes]
    expected = (offline.hits[np.minimum(scaled, offline.hits.size - 1)] / offline.accesses).tolist()
    assert [point.hit_rate for point in level.curve.points(rows.size)] == pytest.approx(expected)


def test_memory_does_not_grow_with_the_rows():
    curve = Curve(1 << 22)
    assert curve.nbytes < 800_000
    level = watched_level("lru", 100)
    before = level.nbytes
    assert before > Level(POLICIES["lru"], 100).nbytes
    for start in range(0, 1_000_000, 50_000):
        plan_all(level, [range(start, start + 50_000)])
    assert level.nbytes - before == level.seen.nbytes - 64


def test_a_level_that_nobody_watches_takes_no_notes():
    level = Level(POLICIES["lru"], 10)
    plan_all(level, skewed(5, 100))
    assert (level.counters[LIMIT], level.counters[NOTED], level.curve) == (0, 0, None)


def test_a_curve_begins_at_zero():
    with Store.open({"host": {"capacity": 8 * 50}}, tables={"t": np.zeros((100, 8), np.uint8)}) as store:
        host = store.stats().host
        assert {point.hit_rate for point in host.curve} == {0.0}
        assert (host.curve_uses, host.pays) == (0, None)
        assert "LRU" not in host.report()


def test_a_store_has_the_curves_of_both_tiers():
    """The device's of all rows, the host's of those that the device had not; both against the list."""
    table = np.arange(2000 * 8, dtype=np.uint8).reshape(2000, 8)
    config = {"host": {"capacity": 16 * 60}, "device": {"device": "cpu", "capacity": 16 * 20}}
    batches = skewed(200, 2000, size=50)
    below = []
    with Store.open(config, tables={"t": table}) as store:
        upper, lower = store._device.level, store._host.level
        models = [Model(level.curve.sizes, level.curve.rate) for level in (upper, lower)]
        for batch in batches:
            held = set(upper.slots["key"].tolist())
            below.append([row for row in batch if row not in held])
            store.fetch(batch)
            models[0].plan(batch)
            models[1].plan(below[-1])
        stats = store.stats()
        for tier, model in zip((stats.device, stats.host), models, strict=True):
            assert tier.curve_uses == model.uses == tier.hits + tier.misses
            assert [point.hit_rate for point in tier.curve] == pytest.approx(model.points(model.uses))
        assert stats.report().startswith("device, gittins: ")
        assert "\nhost, gittins: " in stats.report()
        assert stats.report().count("LRU, begun empty, would have, by ") == 2


def test_threads_share_a_curve_under_the_stores_lock():
    table = np.zeros((5000, 8), np.uint8)
    batches = skewed(120, 5000, seed=3)
    with Store.open({"host": {"capacity": 8 * 64}}, tables={"t": table}) as store:

        def fetch(part):
            for batch in part:
                store.fetch(batch)
                store.stats()

        threads = [threading.Thread(target=fetch, args=(batches[number::4],)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        host = store.stats().host
        assert host.curve_uses == host.hits + host.misses == sum(len(set(batch)) for batch in batches)
        rates = [point.hit_rate for point in host.curve]
        assert rates == sorted(rates)


def test_a_host_tier_pays_where_hits_save_more_time_than_the_books_take():
    least = BOOKS_NS / 10_000
    pays, why = host_pays(hits=40, misses=960, capacity_slots=100, row_ns=10_000)
    assert pays
    assert f"from a hit rate of {least:.1%}, and it is 4.0%" in why
    assert host_pays(hits=20, misses=980, capacity_slots=100, row_ns=10_000)[0] is False
    assert host_pays(hits=0, misses=99, capacity_slots=100, row_ns=10_000)[0] is None
    assert host_pays(hits=40, misses=960, capacity_slots=100, row_ns=0) == (None, "no fetch has read rows from below")


def test_a_device_tier_pays_where_hits_save_more_records_than_were_copied():
    assert device_pays(hits=10, risen=10, asked=100, capacity_slots=50)[0] is True
    pays, why = device_pays(hits=9, risen=10, asked=100, capacity_slots=50)
    assert pays is False
    assert why == "9 hits saved as many records on the bus, and 10 were copied to make them"
    assert device_pays(hits=9, risen=10, asked=49, capacity_slots=50)[0] is None


def test_a_scan_makes_a_tier_that_does_not_pay():
    """Nothing is used twice; what a row from below takes has been measured by then."""
    with Store.open({"host": {"capacity": 8 * 64}}, tables={"t": np.zeros((4000, 8), np.uint8)}) as store:
        for start in range(0, 4000, 100):
            store.fetch(range(start, start + 100))
        stats = store.stats()
        assert stats.row_ns > 0
        assert stats.host.pays is False
        assert {point.hit_rate for point in stats.host.curve} == {0.0}
        assert "does not pay: a hit saves the" in stats.host.report()
        before = stats.row_ns
        store.prefetch([1, 2, 3]).take()
        assert store.stats().row_ns == before, "a prefetch that is taken says nothing of the time of its reads"
