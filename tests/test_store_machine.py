"""A store against a numpy oracle, whatever is asked of it and in whatever order; and from eight threads at once."""

import errno
import random
import shutil
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from golden_policies import options_of, zipf_trace
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from stores import ENGINES, ENGRAM, open_with, write_engram, write_rows

from tiercache import groups
from tiercache.errors import StorageError
from tiercache.flight import Ticket
from tiercache.policies import POLICIES
from tiercache.storage import open_table
from tiercache.storage.memory import MemoryTable
from tiercache.testing import FaultySource, broken, oracle

NUM_ROWS = 40
RECORDS = oracle(np.arange(NUM_ROWS), 264)
TABLES = ("plain", "fields", "source")
TABLE = st.sampled_from(TABLES)
ROWS = st.lists(st.integers(0, NUM_ROWS - 1), max_size=30).map(lambda rows: np.array(rows, np.int64))


class Begun(NamedTuple):
    """A prefetch, and which rows' reads may have failed since."""

    ticket: Ticket
    table: str
    rows: np.ndarray
    may_fail: set[int]


class StoreMachine(RuleBasedStateMachine):
    """Two tables on disk and a source that fails on request share tiny tiers: with no device, one on the CPU, or one whose
    streams run late and in any order. With groups, each row that is drawn stands for one, and any of them may have one key.
    """

    begun = Bundle("begun")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.store = None
        self.fake: FakeDevice | None = None
        self.unchecked: list[tuple[np.ndarray, torch.Tensor]] = []
        self.in_flight: list[Begun] = []
        self.group_rows = 1
        self.keys_of = groups.keys_of

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        capacity=st.sampled_from([1, 2, 3, 7, 40, 3 * NUM_ROWS]),
        engine=st.sampled_from(ENGINES),
        direct=st.booleans(),
        device=st.sampled_from(["none", "cpu", "streams"]),
        device_policy=st.sampled_from(sorted(POLICIES)),
        device_capacity=st.sampled_from([1, 2, 5, 3 * NUM_ROWS]),
        most=st.sampled_from([1, 2, 100]),
        seed=st.integers(0, 2**32),
        group_rows=st.sampled_from([1, 1, 2, 8]),
        key_bits=st.sampled_from([63, 3]),
    )
    def open(
        self, policy, capacity, engine, direct, device, device_policy, device_capacity, most, seed, group_rows, key_bits
    ) -> None:
        self.group_rows, self.collide = group_rows, key_bits < 63
        mask = (1 << key_bits) - 1
        groups.keys_of = lambda rows, size: self.keys_of(rows, size) & mask
        slot_bytes = 272 * group_rows
        plain = write_rows(self.directory / "plain.safetensors", NUM_ROWS, 264)
        engram = write_engram(self.directory / "fields.safetensors", RECORDS)
        self.source = FaultySource(MemoryTable(RECORDS, ENGRAM))
        tables = {"fields": open_table("fields", engram, fields=("weight", "scale")), "source": self.source}
        trace = zipf_trace(1000, 3 * NUM_ROWS, 0)
        above = None
        if device != "none":
            self.fake = FakeDevice(random.Random(seed).randrange) if device == "streams" else None
            settings = {"device": "cpu", "capacity": slot_bytes * device_capacity, "promotion": slot_bytes * most}
            above = (device_policy, options_of(device_policy, device_capacity, trace), settings, self.fake)
        self.store = open_with(
            policy,
            options_of(policy, capacity, trace),
            capacity * slot_bytes,
            {"plain": plain},
            tables,
            device=above,
            group_rows=group_rows,
            engine=engine,
            direct=direct,
        )

    def asked(self, rows: np.ndarray) -> np.ndarray:
        """What is asked for where these are drawn: groups that share rows."""
        members = np.arange(self.group_rows) ** 2
        return ((rows[:, None] + members) % NUM_ROWS).reshape(-1)

    def failing(self, table: str, rows: np.ndarray) -> set[int]:
        return set(rows.tolist()) & set(self.source.errors) if table == "source" else set()

    def attempt(self, table: str, rows: np.ndarray, call: Callable[[], torch.Tensor]) -> int:
        """Call, and compare what comes with the oracle; the errno where nothing came, else 0."""
        try:
            fetched = call()
        except StorageError as error:
            return error.errno
        self.unchecked.append((rows, fetched))
        if self.fake is None:
            self.compare()
        return 0

    def compare(self) -> None:
        """Everything fetched so far is exact, once the streams have run."""
        for rows, fetched in self.unchecked:
            assert np.array_equal(fetched.numpy(), RECORDS[rows])
        self.unchecked.clear()

    @rule()
    def synchronise(self) -> None:
        if self.fake is not None:
            self.fake.run_all()
            self.compare()

    @rule(table=TABLE, rows=ROWS)
    def fetch(self, table: str, rows: np.ndarray) -> None:
        rows = self.asked(rows)
        before = self.store.stats()
        error = self.attempt(table, rows, partial(self.store.fetch, rows, table=table, raw=True))
        assert error in (0, errno.EIO)
        assert not error or self.failing(table, rows)
        after = self.store.stats()
        distinct = len(np.unique(rows.reshape(-1, self.group_rows), axis=0))
        asked = [stats.device or stats.host for stats in (before, after)]
        counted = asked[1].hits + asked[1].misses - asked[0].hits - asked[0].misses
        assert counted == distinct or (self.group_rows > 1 and self.collide and counted < distinct)
        if after.device is not None:
            missed = after.device.misses - before.device.misses
            assert after.host.hits + after.host.misses == before.host.hits + before.host.misses + missed
        assert after.rows == before.rows + rows.size

    @rule(target=begun, table=TABLE, rows=ROWS, deadline=st.sampled_from([None, 0, 0.001, 3600]))
    def prefetch(self, table: str, rows: np.ndarray, deadline: float | None) -> Begun:
        rows = self.asked(rows)
        ticket = self.store.prefetch(rows, table=table, deadline=deadline)
        begun = Begun(ticket, table, rows, self.failing(table, rows))
        self.in_flight.append(begun)
        return begun

    @rule(begun=consumes(begun))
    def take(self, begun: Begun) -> None:
        self.in_flight.remove(begun)
        error = self.attempt(begun.table, begun.rows, partial(begun.ticket.take, raw=True))
        assert not error or begun.may_fail

    @rule(begun=consumes(begun), drop=st.booleans())
    def abandon(self, begun: Begun, drop: bool) -> None:
        place = next(place for place, other in enumerate(self.in_flight) if other is begun)
        self.in_flight.pop(place)
        if drop:  # Hypothesis keeps the ticket, so that it does not go by itself.
            begun.ticket.__del__()
            begun.ticket._flight = None
        else:
            begun.ticket.cancel()

    @rule(rows=st.sets(st.integers(0, NUM_ROWS - 1), max_size=10))
    def fail(self, rows: set[int]) -> None:
        self.source.errors = dict.fromkeys(rows, errno.EIO)
        for begun in self.in_flight:
            begun.may_fail.update(self.failing(begun.table, begun.rows))

    @rule(table=st.sampled_from(TABLES[:2]), rows=ROWS)
    def fetch_while_the_disk_fails(self, table: str, rows: np.ndarray) -> None:
        rows = self.asked(rows)
        for begun in self.in_flight:
            if begun.table == table:
                begun.may_fail.update(begun.rows.tolist())
        with broken(self.directory / f"{table}.safetensors"):
            error = self.attempt(table, rows, partial(self.store.fetch, rows, table=table, raw=True))
            assert not error or rows.size
            for begun in self.in_flight:
                if begun.table == table and begun.ticket._flight.job is not None:
                    begun.ticket._flight.job.wait()

    @invariant()
    def books(self) -> None:
        if self.store is not None:
            self.store.check()

    def teardown(self) -> None:
        if self.store is not None:
            for begun in self.in_flight:
                job = begun.ticket._flight.job
                begun.ticket.cancel()
                if job is not None:
                    job.wait()
            self.source.errors = {}
            for table in TABLES:
                rows = np.arange(NUM_ROWS)
                assert not self.attempt(table, rows, partial(self.store.fetch, rows, table=table, raw=True))
            self.synchronise()
            self.store.check()
            assert self.store.stats().flights == 0
            self.store.close()
        groups.keys_of = self.keys_of
        shutil.rmtree(self.directory)


StoreMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestStore = StoreMachine.TestCase


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("capacity", [3, 60, 400])
def test_eight_threads_at_once(tmp_path: Path, engine: str, capacity: int) -> None:
    records = oracle(np.arange(500), 264)
    paths = {"file": write_rows(tmp_path / "t.safetensors", 500, 264)}
    faulty = FaultySource(MemoryTable(records, ENGRAM), errors=dict.fromkeys(range(0, 500, 50), errno.EIO))
    wrong: list[str] = []
    exact = [0] * 8
    with open_with("s3fifo", {}, capacity * 264, paths, {"source": faulty}, engine=engine) as store:

        def work(number: int) -> None:
            draw = np.random.default_rng(number)
            tickets = []
            for _ in range(150):
                table = ("file", "source")[int(draw.integers(2))]
                rows = draw.zipf(1.3, int(draw.integers(1, 60))) % 500
                try:
                    if draw.random() < 0.4:
                        tickets.append((store.prefetch(rows, table=table, deadline=draw.random() / 100), rows))
                        fetched = None
                    elif tickets and draw.random() < 0.5:
                        ticket, rows = tickets.pop(int(draw.integers(len(tickets))))
                        fetched = ticket.take(raw=True) if draw.random() < 0.8 else ticket.cancel()
                    else:
                        fetched = store.fetch(rows, table=table, raw=True)
                except StorageError as error:
                    if not (error.errno == errno.EIO and (rows % 50 == 0).any()):
                        wrong.append(f"{table} {rows}: {error}")
                    continue
                if fetched is not None:
                    exact[number] += 1
                    if not np.array_equal(fetched.numpy(), records[rows]):
                        wrong.append(f"{table} {rows}: other bytes")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert min(exact) > 20
        store.fetch(range(500), table="file")
        store.check()
        while store.stats().flights:  # reads of dropped tickets
            store.check()
