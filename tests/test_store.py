"""The store: every table under the contract of sources, and everything that a caller may ask for."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_policies import options_of, zipf_trace
from stores import ENGINES, ENGRAM, StoreSource, config_of, open_with, oracle_tensor, write_engram, write_rows, write_shards

from tiercache.lab.simulator import Counts, simulate
from tiercache.policies import POLICIES
from tiercache.records import Field, Record, plain
from tiercache.stats import LevelStats, StorageStats, StoreStats
from tiercache.storage import probe
from tiercache.storage.memory import MemoryTable
from tiercache.storage.pack import pack_rows
from tiercache.store import Store
from tiercache.testing import FaultySource, OracleSource, SourceContract, oracle


class TestMemory(SourceContract):
    def open_source(self, records, directory):
        return MemoryTable(records, self.record)


class TestFaultySourceWithoutFaults(SourceContract):
    def open_source(self, records, directory):
        return FaultySource(OracleSource(self.num_rows, self.record))


class TestStoreOverMemory(SourceContract):
    def open_source(self, records, directory):
        return StoreSource(Store.open(config_of(capacity=264 * 20), tables={"t": records}))


class TestSafetensors(SourceContract):
    def open_source(self, records, directory):
        return StoreSource(Store.open(config_of(write_rows(directory / "t.safetensors", *records.shape), capacity=264)))


class TestSafetensorsWithRowsLongerThanAPage(SourceContract):
    record = plain("U8", 20_001)

    def open_source(self, records, directory):
        path = write_rows(directory / "t.safetensors", *records.shape)
        return StoreSource(Store.open(config_of(path, engine="uring", capacity=100 * 20_008)))


class TestSafetensorsWithTinyRows(SourceContract):
    record = plain("U8", 3)

    def open_source(self, records, directory):
        return StoreSource(Store.open(config_of(write_rows(directory / "t.safetensors", *records.shape), capacity=8)))


class TestShards(SourceContract):
    def open_source(self, records, directory):
        config = config_of(write_shards(directory, records, 5), engine="uring", capacity=264 * 50)
        config["table"][0]["fields"] = ["rows.{shard}"]
        return StoreSource(Store.open(config))


class TestFields(SourceContract):
    record = ENGRAM
    resident = ()

    def open_source(self, records, directory):
        config = config_of(write_engram(directory / "t.safetensors", records), capacity=264 * 50)
        config["table"][0] |= {"fields": ["weight", "scale"], "resident": self.resident}
        return StoreSource(Store.open(config))


class TestFieldsOfWhichOneIsResident(TestFields):
    resident = ("scale",)


class TestPacked(SourceContract):
    record = ENGRAM
    verify = "off"

    def open_source(self, records, directory):
        pack_rows(MemoryTable(records, self.record), directory / "packed")
        return StoreSource(Store.open(config_of(directory / "packed", capacity=264 * 7, verify=self.verify)))


class TestPackedWithItsPagesVerified(TestPacked):
    verify = "page"


@pytest.fixture
def records() -> np.ndarray:
    return oracle(np.arange(200), 24)


@pytest.fixture
def store(records):
    with Store.open(config_of(capacity=24 * 10), tables={"t": records}) as store:
        yield store


# what a caller may ask for


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", ">u8"])
def test_indices_are_any_integers_and_any_shape(store, records, kind):
    for shape in [(), (1,), (17,), (0,), (3, 0, 2), (4, 5), (2, 1, 3)]:
        rows = np.random.default_rng(0).integers(0, 100, shape).astype(kind)
        served = store.fetch(rows)
        assert (served.dtype, served.shape) == (torch.uint8, (*shape, 24))
        assert np.array_equal(served.numpy(), records[rows.astype(np.int64)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64])
def test_indices_are_tensors(store, records, dtype):
    rows = torch.arange(100).reshape(10, 10).T.to(dtype)
    assert np.array_equal(store.fetch(rows[::2, 3:]).numpy(), records[:100].reshape(10, 10, 24).swapaxes(0, 1)[::2, 3:])


@pytest.mark.parametrize("rows", [[3, 1, 3], (5, 5), range(4), 7, np.int64(7), [[1], [2]], [], np.arange(6)[::-2]])
def test_indices_are_numbers(store, records, rows):
    assert np.array_equal(store.fetch(rows).numpy(), records[np.asarray(rows, np.int64)])


def test_indices_may_be_read_only(store, records):
    rows = np.arange(5)
    rows.setflags(write=False)
    assert np.array_equal(store.fetch(rows).numpy(), records[:5])


def test_out_is_written_and_returned(store, records):
    rows = np.array([[5, 199], [5, 0]])
    out = torch.zeros((2, 2, 24), dtype=torch.uint8)
    assert store.fetch(rows, out=out) is out
    assert np.array_equal(out.numpy(), records[rows])
    taken = torch.zeros((2, 2, 24), dtype=torch.uint8)
    assert store.prefetch(rows).take(out=taken) is taken
    assert torch.equal(taken, out)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "record",
    [
        plain("BF16", 12),
        plain("F16", 12),
        plain("F32", 6),
        plain("I8", 24),
        Record((Field("w", "F8_E4M3", 24),), 0.37),
        Record((Field("w", "F8_E4M3", 20), Field("s", "F8_E8M0", 4))),
    ],
    ids=["bf16", "f16", "f32", "i8", "fp8", "fp8-blocks"],
)
def test_rows_are_decoded_as_the_record_says(records, record, dtype):
    config = config_of(capacity=24 * 10) | {"dtype": dtype}
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    with Store.open(config, tables={"t": MemoryTable(records, record)}) as store:
        rows = np.random.default_rng(0).integers(0, 200, (7, 30))
        expected = record.decode(torch.from_numpy(records[rows]).reshape(-1, 24), wanted).reshape(7, 30, -1)
        served = store.fetch(rows)
        assert served.shape == (7, 30, store.dim())
        torch.testing.assert_close(served, expected, rtol=0, atol=0, equal_nan=True)
        out = torch.empty_like(served)
        torch.testing.assert_close(store.prefetch(rows).take(out=out), expected, rtol=0, atol=0, equal_nan=True)
        assert np.array_equal(store.fetch(rows, raw=True).numpy(), records[rows])


def test_tables_share_the_tier_and_keep_their_own_rows(tmp_path):
    path = write_rows(tmp_path / "t.safetensors", 50, 264)
    with Store.open(config_of(path, capacity=264 * 8), tables={"small": oracle(np.arange(30), 8)}) as store:
        assert store.tables == ("file", "small")
        assert [store.num_rows(name) for name in store.tables] == [50, 30]
        for _ in range(3):
            for name, width in (("file", 264), ("small", 8)):
                assert torch.equal(store.fetch([29, 3, 29], table=name), oracle_tensor([29, 3, 29], width))
        assert store.stats().host.hits == 8


def test_the_number_of_a_row_is_within_its_table(tmp_path):
    with Store.open(config_of(capacity=800), tables={"a": oracle(range(5), 8), "b": oracle(range(9), 8)}) as store:
        for name, row in (("a", 5), ("b", 9), ("a", -1)):
            with pytest.raises(IndexError, match=rf"row {row} .*table '{name}'"):
                store.fetch([0, row], table=name)


# tickets


@pytest.fixture
def source(records):
    return FaultySource(MemoryTable(records))


def rows_read(source):
    return sorted(row for rows in source.reads for row in rows.tolist())


def test_what_is_on_its_way_is_not_read_again(source, records):
    with Store.open(config_of(), tables={"t": source}) as store:
        source.gate.clear()
        tickets = [store.prefetch([1, 2, 3]), store.prefetch([3, 4, 1]), store.prefetch([2, 2])]
        assert not any(ticket.done for ticket in tickets)
        source.gate.set()
        assert np.array_equal(store.fetch([4, 3, 9]).numpy(), records[[4, 3, 9]])
        for ticket, rows in zip(tickets, ([1, 2, 3], [3, 4, 1], [2, 2]), strict=True):
            assert np.array_equal(ticket.take().numpy(), records[rows])
        assert rows_read(source) == [1, 2, 3, 4, 9]


def test_prefetch_returns_before_its_rows_are_read(source, records):
    with Store.open(config_of(), tables={"t": source}) as store:
        source.gate.clear()
        ticket = store.prefetch([5])
        source.begun.wait()
        assert not ticket.done
        source.gate.set()
        assert np.array_equal(ticket.take().numpy(), records[[5]])


def test_a_ticket_of_resident_rows_is_done_at_once(store):
    store.fetch([1, 2])
    assert store.prefetch([2, 1, 1]).done


def test_rows_of_a_ticket_stay_until_it_is_taken(source, records):
    with Store.open(config_of(capacity=24 * 2), tables={"t": source}) as store:
        ticket = store.prefetch([0, 1])
        for row in range(2, 50):
            assert np.array_equal(store.fetch([row]).numpy(), records[[row]])
        store.fetch([0, 1])
        assert rows_read(source) == list(range(50))
        assert store.stats().host.pinned_slots == 2
        assert np.array_equal(ticket.take().numpy(), records[[0, 1]])
        assert store.stats().host.pinned_slots == 0


def test_a_ticket_may_be_larger_than_the_tier(records):
    with Store.open(config_of(capacity=24), tables={"t": records}) as store:
        tickets = [store.prefetch(range(start, 200, 3)) for start in range(3)]
        for start, ticket in enumerate(tickets):
            assert np.array_equal(ticket.take().numpy(), records[start::3])


def test_a_ticket_is_taken_once(store):
    ticket = store.prefetch([1])
    ticket.take()
    with pytest.raises(RuntimeError, match="taken"):
        ticket.take()
    ticket.cancel()


def test_a_wrong_out_leaves_the_ticket_as_it_was(store, records):
    ticket = store.prefetch([1, 2])
    with pytest.raises(ValueError, match="shape"):
        ticket.take(out=torch.empty((3, 24), dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"float32.*uint8"):
        ticket.take(out=torch.empty((2, 24)))
    with pytest.raises(ValueError, match="stream"):
        ticket.take(object())
    assert np.array_equal(ticket.take().numpy(), records[[1, 2]])


@pytest.mark.parametrize("end", ["cancel", "drop"])
def test_a_ticket_given_up_lets_go_of_its_slots(source, records, end):
    with Store.open(config_of(capacity=24 * 3), tables={"t": source}) as store:
        ticket = store.prefetch([0, 1, 2])
        store.fetch([0, 1, 2])
        if end == "cancel":
            ticket.cancel()
            with pytest.raises(RuntimeError, match="cancelled"):
                ticket.take()
        del ticket
        store.fetch([10, 11, 12])
        assert store.stats().host.pinned_slots == store.stats().flights == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cancelled_ticket_spoils_nothing_for_others(tmp_path, engine):
    path = write_rows(tmp_path / "t.safetensors", 5000, 264)
    with Store.open(config_of(path, engine=engine, capacity=264 * 4000)) as store:
        rows = np.random.default_rng(0).permutation(5000)[:3000]
        doomed = store.prefetch(rows, deadline=60)
        other = store.prefetch(rows[-50:])
        doomed.cancel()
        assert torch.equal(store.fetch(rows[1000:1100]), oracle_tensor(rows[1000:1100], 264))
        assert torch.equal(other.take(), oracle_tensor(rows[-50:], 264))
        assert torch.equal(store.fetch(rows), oracle_tensor(rows, 264))


@pytest.mark.parametrize("deadline", [-1, -0.001, float("nan"), "soon"])
def test_a_deadline_lies_ahead(store, deadline):
    with pytest.raises(ValueError, match="deadline"):
        store.prefetch([1], deadline=deadline)


@pytest.mark.parametrize("deadline", [None, 0, 0.5, float("inf")])
@pytest.mark.parametrize("engine", ENGINES)
def test_take_does_not_wait_for_the_deadline(tmp_path, engine, deadline):
    path = write_rows(tmp_path / "t.safetensors", 50, 264)
    with Store.open(config_of(path, engine=engine)) as store:
        ticket = store.prefetch([1, 49], deadline=deadline)
        assert torch.equal(ticket.take(), oracle_tensor([1, 49], 264))


# counts


def test_stats_count_distinct_rows_of_each_batch(store):
    store.fetch([1, 1, 2])
    store.fetch([2, 3, 3, 3])
    ticket = store.prefetch([1, 2, 3])
    stats = store.stats()
    assert (stats.fetches, stats.rows, stats.flights, stats.storage) == (3, 10, 1, None)
    assert (stats.host.hits, stats.host.misses, stats.host.bypasses) == (4, 3, 0)
    assert (stats.host.used_slots, stats.host.pinned_slots, stats.host.capacity_slots) == (3, 3, 10)
    ticket.take()
    assert store.stats().flights == 0


def test_a_call_that_is_refused_counts_nothing(store):
    for bad in ([200], [0.5], [-1]):
        with pytest.raises((IndexError, TypeError)):
            store.fetch(bad)
    assert (store.stats().fetches, store.stats().host.misses) == (0, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_stats_of_the_disk(tmp_path, engine):
    with Store.open(config_of(write_rows(tmp_path / "t.safetensors", 50, 264), engine=engine, direct=False)) as store:
        store.fetch([0, 49])
        storage = store.stats().storage
        assert (storage.engine, storage.alignment, storage.jobs, storage.notes) == (engine, 1, 0, ())
        assert (storage.reads, storage.bytes_read) == (2, 2 * 264)


def test_stats_of_the_disk_leave_the_probe_out(tmp_path):
    with Store.open(config_of(write_rows(tmp_path / "t.safetensors", 50, 264), engine="auto", direct=False)) as store:
        storage = store.stats().storage
        assert (storage.reads, storage.bytes_read, storage.jobs) == (0, 0, 0)
        store.fetch([0, 49])
        storage = store.stats().storage
        assert (storage.reads, storage.bytes_read) == (2, 2 * 264)


def test_a_store_warns_of_values_without_their_scale(tmp_path):
    path = write_engram(tmp_path / "t.safetensors", oracle(np.arange(5), 264))
    config = config_of()
    config["table"] = [{"path": path, "fields": ["weight"]}]
    with pytest.warns(RuntimeWarning, match=r"no scale among the fields.*'weight' stay.*'scale'"), Store.open(config) as store:
        assert "'scale'" in store.stats().storage.notes[0]


def test_a_store_says_what_its_rows_are(tmp_path):
    path = write_engram(tmp_path / "t.safetensors", oracle(np.arange(5), 264))
    config = config_of() | {"table": [{"name": "fp8", "path": path, "fields": ["weight", "scale"]}]}
    with Store.open(config, tables={"plain": np.zeros((3, 5), np.float32)}) as store:
        assert (store.dtype("fp8"), store.record_bytes("fp8"), store.dim("fp8")) == (torch.bfloat16, 264, 256)
        assert (store.dtype("plain"), store.record_bytes("plain"), store.dim("plain")) == (torch.float32, 20, 5)
        for table in store.tables:
            assert store.fetch([0], table=table).dtype == store.dtype(table)
            assert store.fetch([0], table=table, raw=True).shape == (1, store.record_bytes(table))
    with Store.open({"dtype": "float16"}, tables={"plain": np.zeros((3, 5), np.float32)}) as store:
        assert store.dtype() == torch.float16


def test_every_count_is_explained():
    for kind in (StoreStats, LevelStats, StorageStats):
        explained = [line.split()[0] for line in kind.__doc__.splitlines() if line.startswith("    ") and line.strip()]
        assert explained == list(kind._fields)


@pytest.mark.parametrize(("threads_rate", "engine"), [(50.0, "uring"), (120.0, "uring"), (130.0, "threads")])
def test_auto_measures_both_engines_and_wants_threads_to_be_faster_by_a_quarter(tmp_path, monkeypatch, threads_rate, engine):
    path = write_rows(tmp_path / "t.safetensors", 50, 264)
    measured = []

    def measure(engines, files):
        measured.extend(original(engines, files))
        return [100.0, threads_rate]

    original = probe._measure
    monkeypatch.setattr(probe, "_measure", measure)
    with Store.open(config_of(path, engine="auto")) as store:
        storage = store.stats().storage
        assert len(measured) == 2
        assert min(measured) > 0
        assert storage.probe_reads_per_s == {"uring": 100.0, "threads": threads_rate}
        assert storage.engine == engine
        assert len([t for t in threading.enumerate() if t.name.startswith("tiercache-")]) in (1, 8)
        assert torch.equal(store.fetch([7]), oracle_tensor([7], 264))


@pytest.mark.parametrize("capacity", [1, 2, 7, 100, 999])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_live_store_counts_what_the_simulator_counts(policy, capacity):
    rows, batch = zipf_trace(3000, num_rows=1000, seed=capacity), 12
    options = options_of(policy, capacity, rows, batch)
    offsets = np.append(np.arange(0, rows.size, batch), rows.size)
    records = oracle(np.arange(1000), 8)
    with open_with(policy, options, 8 * capacity, {}, {"t": records}) as store:
        for number, start in enumerate(offsets[:-1]):
            wanted = rows[start : start + batch]
            served = store.fetch(wanted) if number % 2 else store.prefetch(wanted).take()
            assert np.array_equal(served.numpy(), records[wanted])
        host = store.stats().host
    assert Counts(host.hits + host.misses, host.hits, host.misses, host.bypasses) == simulate(
        policy, capacity, rows, offsets, **options
    )


def test_jit_off_serves_and_counts_the_same(tmp_path):
    script = Path(__file__).with_name("scenario.py")
    printed = []
    for number, environment in enumerate(({}, {"NUMBA_DISABLE_JIT": "1"})):
        directory = tmp_path / str(number)
        directory.mkdir()
        done = subprocess.run(
            [sys.executable, "-W", "error", script, directory],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        printed.append(json.loads(done.stdout))
    assert printed[0] == printed[1]
    assert len(printed[0]) == 5
