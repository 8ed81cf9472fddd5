"""The order of streams: right rows whatever legal order the work runs in, and wrong ones as soon as a part of the protocol is
left out.
"""

import random
import time

import numpy as np
import pytest
import torch
from fake_device import CAPTURED, FakeDevice
from stores import ENGRAM, open_with

from tiercache.flight import Flight
from tiercache.storage.memory import MemoryTable
from tiercache.testing import FaultySource, oracle
from tiercache.tiers.device import MAX_PARCELS, Parcels

NUM_ROWS = 60
RECORDS = oracle(np.arange(NUM_ROWS), 264)


def same(one, other):
    """Equal, and NaN where the other is."""
    return torch.equal(one.nan_to_num(nan=12345.0), other.nan_to_num(nan=12345.0))


def open_store(device, *, capacity=20, device_capacity=6, most=4):
    settings = {"device": "cpu", "capacity": 272 * device_capacity, "promotion": 272 * most}
    source = FaultySource(MemoryTable(RECORDS, ENGRAM))
    return open_with("lru", {}, 272 * capacity, {}, {"t": source}, device=("lru", {}, settings, device))


def serve(device, seed):
    """Fetches and tickets on three streams, none waited for; the number of results with a wrong row, and of faults."""
    draw = np.random.default_rng(seed)
    results, tickets = [], []
    with open_store(device) as store:
        for _ in range(80):
            rows = draw.zipf(1.4, int(draw.integers(1, 12))) % NUM_ROWS
            stream = ("a", "b", "c")[int(draw.integers(3))]
            if draw.random() < 0.3:
                tickets.append((store.prefetch(rows), rows))
            elif tickets and draw.random() < 0.5:
                ticket, rows = tickets.pop(int(draw.integers(len(tickets))))
                results.append((rows, ticket.take(stream, raw=True)))
            else:
                results.append((rows, store.fetch(rows, stream, raw=True)))
        del tickets
        deadline = time.monotonic() + 30
        while store.stats().flights and time.monotonic() < deadline:  # rows of dropped tickets still arrive
            device.run_all()
            store.check()
        assert store.stats().flights == 0
        assert store.stats().device.hits > 0
    return device.num_faults + sum(not np.array_equal(result.numpy(), RECORDS[rows]) for rows, result in results)


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_right_in_any_order(seed):
    assert serve(FakeDevice(random.Random(seed).randrange), seed) == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lazy", [True, False], ids=["as late as possible", "at once"])
def test_rows_are_right_at_the_extremes(lazy, seed):
    device = FakeDevice(lambda n: 0 if lazy else n - 1)
    assert serve(device, seed) == 0


def broken_streams(monkeypatch):
    """Gathers do not wait for copies on their way up."""
    monkeypatch.setattr(FakeDevice, "wait", lambda self, stream, event: None)


def broken_pins(monkeypatch):
    """Slots are let go of while streams still read them."""
    monkeypatch.setattr(Flight, "done", Flight.brought)


def broken_parcels(monkeypatch):
    """Pinned memory for places is used again at once."""

    def give_back(self, parcel, event):
        parcel.event = None
        self._idle.append(parcel)

    monkeypatch.setattr(Parcels, "give_back", give_back)


@pytest.mark.parametrize("part", [broken_streams, broken_pins, broken_parcels])
def test_a_broken_order_is_caught(monkeypatch, part):
    part(monkeypatch)
    wrong = [serve(FakeDevice(random.Random(seed).randrange), seed) for seed in range(20)]
    assert sum(wrong) > 0


def test_a_fetch_of_prefetched_rows_makes_no_wait_and_allocates_nothing():
    device = FakeDevice(lambda n: 0)
    rows = torch.arange(12)
    with open_store(device, capacity=40, device_capacity=40, most=40) as store:
        out = torch.zeros(12, 256, dtype=torch.bfloat16)
        for _ in range(3):  # rows rise, and parcels are made
            ticket = store.prefetch(rows)
            ticket.take(out=out)
            device.run_all()
        ticket = store.prefetch(rows)
        assert ticket.done
        before = device.num_waits, device.num_allocations
        ticket.take(out=out)
        assert (device.num_waits, device.num_allocations) == before
        device.run_all()
        assert same(out, ENGRAM.decode(torch.from_numpy(RECORDS[:12])))


def test_rows_are_decoded_on_the_way():
    device = FakeDevice(random.Random(0).randrange)
    with open_store(device) as store:
        for _ in range(4):
            rows = store.fetch([[3, 5], [3, 59]])
        device.run_all()
        assert same(rows.view(4, -1), ENGRAM.decode(torch.from_numpy(RECORDS[[3, 5, 3, 59]])))


def test_what_rises_in_one_fetch_is_bounded():
    device = FakeDevice(lambda n: n - 1)
    with open_store(device, capacity=40, device_capacity=40, most=4) as store:
        used = []
        for _ in range(5):
            store.fetch(range(10))
            used.append(store.stats().device.used_slots)
        assert used == [0, 4, 8, 10, 10]
        assert store.stats().device.hits == 4 + 8 + 10


def test_a_scan_does_not_rise():
    device = FakeDevice(lambda n: n - 1)
    with open_store(device) as store:
        store.fetch(range(NUM_ROWS))
        assert store.stats().device.used_slots == 0


def test_the_host_waits_where_too_many_places_are_on_their_way():
    device = FakeDevice(lambda n: 0)
    with open_store(device) as store:
        results = [store.fetch([number % 5], raw=True) for number in range(2 * MAX_PARCELS)]
        assert device.num_waits > 0
        device.run_all()
        for number, result in enumerate(results):
            assert np.array_equal(result.numpy()[0], RECORDS[number % 5])


@pytest.mark.parametrize("call", ["fetch", "prefetch"])
@pytest.mark.parametrize("name", ["fill", "record", "upload"])
def test_what_was_not_copied_has_not_risen(monkeypatch, name, call):
    device = FakeDevice(random.Random(3).randrange)
    with open_store(device, capacity=40, device_capacity=40, most=40) as store:
        store.fetch(range(10), raw=True)

        def fail(*arguments):
            raise MemoryError

        monkeypatch.setattr(device, name, fail)
        with pytest.raises(MemoryError):
            getattr(store, call)(range(10))
        monkeypatch.undo()
        for _ in range(3):
            fetched = store.fetch(range(10), raw=True)
            device.run_all()
            assert np.array_equal(fetched.numpy(), RECORDS[:10])
        store.check()
        assert store.stats().flights == 0


def test_close_waits_for_the_device():
    device = FakeDevice(lambda n: 0)
    store = open_store(device)
    result = store.fetch([7], raw=True)
    store.close()
    assert np.array_equal(result.numpy()[0], RECORDS[7])


# graphs


def capture(device, static):
    """What the graph of a launch holds."""
    static.launch(CAPTURED)
    assert len(device.streams[CAPTURED]) == 1


@pytest.mark.parametrize("seed", range(10))
def test_a_captured_launch_serves_whatever_was_loaded(seed):
    device = FakeDevice(random.Random(seed).randrange)
    draw = np.random.default_rng(seed)
    with open_store(device, capacity=8) as store:
        static = store.static_fetch((3, 4), raw=True)
        with pytest.raises(RuntimeError, match="loaded before"):
            static.launch()
        static.load(np.zeros((3, 4), np.int64), "main")
        capture(device, static)
        kept = []
        for number in range(40):
            rows = draw.zipf(1.3, (3, 4)) % NUM_ROWS
            static.load(rows, "main")
            device.replay("main")
            kept.append((rows, keep(device, static.out)))
            if number % 3 == 0:
                store.fetch(draw.integers(0, NUM_ROWS, 9), "other")
        static.close()
        device.run_all()
        store.check()
        assert store.stats().flights == 0
    assert all(np.array_equal(result.numpy(), RECORDS[rows]) for rows, result in kept)


def keep(device, out):
    """A copy of the output, made in its turn on the stream."""
    copy = torch.zeros_like(out)
    device.queue("main", "run", lambda: copy.copy_(out))
    return copy


def test_a_load_that_fails_leaves_the_last_one_in_place():
    device = FakeDevice(random.Random(1).randrange)
    with open_store(device) as store:
        static = store.static_fetch((2,), raw=True)
        static.load([1, 2])
        capture(device, static)
        with pytest.raises(ValueError, match=r"shape \(3,\); this static fetch is of \(2,\)"):
            static.load([1, 2, 3])
        with pytest.raises(IndexError):
            static.load([1, NUM_ROWS])
        device.replay("main")
        device.run_all()
        assert np.array_equal(static.out.numpy(), RECORDS[[1, 2]])
        static.close()
        device.run_all()
        store.check()
        assert store.stats().flights == 0


def test_a_static_fetch_that_is_dropped_lets_go_of_its_slots():
    device = FakeDevice(random.Random(2).randrange)
    with open_store(device) as store:
        static = store.static_fetch((2,), raw=True)
        static.load([1, 2])
        assert store.stats().flights == 1
        del static
        device.run_all()
        store.check()
        assert store.stats().flights == 0


def test_a_store_without_streams_has_no_static_fetch():
    with open_with("lru", {}, 1 << 16, {}, {"t": RECORDS}) as store, pytest.raises(ValueError, match="static_fetch"):
        store.static_fetch((1,))
