"""Look-ahead: the book of announced uses against lists, choices against Belady, and a store that expects."""

import json
import os
import random
import subprocess
import sys
from bisect import insort
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from golden_policies import zipf_trace
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stores import open_with

from tiercache import ClosedError, ConfigError, Store
from tiercache import store as store_module
from tiercache.engram.demo import demo_hashers
from tiercache.engram.embedding import TieredEmbedding
from tiercache.engram.lookup import EngramState, begun, expect, look_up
from tiercache.lab.ahead import replay_ahead, windows
from tiercache.lab.bounds import bounds, uses_of
from tiercache.lab.simulator import simulate
from tiercache.lab.tokens import SHIPPED_VOCABULARY, load_tokens
from tiercache.lab.trace import Trace, single
from tiercache.level import HITS, Level
from tiercache.policies import LOOK_AHEAD, POLICIES
from tiercache.policies import expected as e
from tiercache.testing import oracle

NUM_ROWS = 40
ROWS = st.lists(st.integers(0, NUM_ROWS - 1), max_size=20)


class ExpectedModel:
    """What was announced, in lists: by row sorted by time, by lane in order. A use is [due, number, row, lane, alive]."""

    def __init__(self, room):
        self.room, self.number = room, 0
        self.by_row, self.lanes, self.lead, self.lag, self.met = {}, {}, Counter(), Counter(), {}
        self.turn = e.TURN

    def announce(self, lane, row, now, accesses):
        """accesses: that one use of a lane takes, if that lane is alone."""
        if sum(map(len, self.lanes.values())) == self.room:
            return
        if not self.left(lane):
            self.met[lane] = now
        lead = (self.left(lane) + 1) * e.TURN
        self.number += 1
        use = [self.turn + lead, self.number, row, lane, True]
        insort(self.by_row.setdefault(row, []), use)
        self.lanes.setdefault(lane, []).append(use)
        if lead > self.lead[lane]:
            self.lead[lane] = lead
            self.lag[lane] = max(self.lag[lane], int(self.left(lane) * (self.active() * accesses)))

    def active(self):
        return sum(self.left(lane) > 0 for lane in self.lanes)

    def end(self, use):
        use[4] = False
        self.by_row[use[2]].remove(use)
        lane = self.lanes[use[3]]
        while lane and not lane[0][4]:
            lane.pop(0)
        if not lane:
            self.lead[use[3]] = self.lag[use[3]] = 0

    def meet(self, row, now):
        if self.by_row.get(row):
            self.turn += e.TURN // self.active()
            self.met[self.by_row[row][0][3]] = now
            self.end(self.by_row[row][0])

    def cancel(self, lane):
        for use in [use for use in self.lanes.get(lane, []) if use[4]]:
            self.end(use)

    def overdue(self, lane, now, patience):
        if self.lanes.get(lane):
            late = self.lanes[lane][0][0] < self.turn - self.lead[lane]
            if late or now - self.met[lane] > max(patience, self.lag[lane]):
                self.end(self.lanes[lane][0])

    def left(self, lane):
        return sum(use[4] for use in self.lanes.get(lane, []))

    def first_due(self, row):
        return self.by_row[row][0][0] if self.by_row.get(row) else e.NO_DUE


class ExpectedMachine(RuleBasedStateMachine):
    """The book of announced uses does what its model in lists does."""

    lanes = st.integers(0, 3)
    rows = st.integers(0, 7)

    @initialize(room=st.sampled_from([1, 5, 1000]))
    def begin(self, room):
        self.book, self.model, self.now = e.new_expected(room), ExpectedModel(room), 0

    @rule(lane=lanes, rows=st.lists(rows, max_size=10))
    def announce(self, lane, rows):
        for row in rows:
            before = self.model.first_due(row)
            self.model.announce(lane, row, self.now, self.book.book[e._TIME] / self.book.book[e._MET])
            due = e.announce(self.book, lane, row, self.now)
            after = self.model.first_due(row)
            assert due == (after if after != before else e.NO_DUE)

    @rule(row=rows, passed=st.integers(1, 5))
    def meet(self, row, passed):
        known = self.model.first_due(row) != e.NO_DUE
        self.model.meet(row, self.now)
        assert e.meet(self.book, row, self.now) == (self.model.first_due(row) if known else e.NONE)
        self.now += passed
        e.count_asked(self.book, passed, self.now)

    @rule(lane=lanes)
    def cancel(self, lane):
        self.model.cancel(lane)
        while e.give_up(self.book, lane) != e.DONE:
            pass

    @rule(patience=st.sampled_from([0, 10]), passed=st.integers(0, 30))
    def look_at_what_is_overdue(self, patience, passed):
        self.now += passed
        for _ in range(3):
            self.model.overdue(int(self.book.book[e._HAND]), self.now, patience)
            e.next_overdue(self.book, self.now, patience)
        self.book.book[e._HAND] %= 4

    @invariant()
    def equal(self):
        e.check(self.book)
        assert [e.first_due(self.book, row) for row in range(8)] == [self.model.first_due(row) for row in range(8)]
        assert self.book.book[e.NOW_TURN] == self.model.turn
        assert [int(self.book.lanes["left"][lane]) for lane in range(4)] == [self.model.left(lane) for lane in range(4)]


ExpectedMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestExpected = ExpectedMachine.TestCase


def looking_ahead(capacity, num_rows=None):
    level = Level(POLICIES["gittins"], capacity, num_rows=num_rows)
    level.look_ahead()
    return level


def of_text(num_tokens=4000, sequences=8):
    """(trace of single rows, sequence of each token, rows a token): documents that take turns, a token each."""
    stream = load_tokens().first(num_tokens)
    hasher = demo_hashers(vocabulary=SHIPPED_VOCABULARY, table_vocabularies=(1000,) * 2)[0]
    rows = hasher.rows(stream.tokens, np.full(sequences, num_tokens // sequences))
    order = np.arange(num_tokens).reshape(sequences, -1).T.reshape(-1)
    return single(rows[order]), np.tile(np.arange(sequences), num_tokens // sequences), hasher.num_heads


@pytest.mark.parametrize("num_rows", [None, 300])
@pytest.mark.parametrize("capacity", [1, 2, 5, 17, 32])
def test_with_all_of_the_future_announced_it_has_beladys_hits(capacity, num_rows):
    rows = zipf_trace(3000, num_rows=300)
    level = looking_ahead(capacity, num_rows)
    assert level.announce(rows, 0) == rows.size
    hits = 0
    for at in range(rows.size):
        level.state.patient[:] = 0  # whatever it learns: what was not announced is not used again
        hits += sum(one_by_one(level, rows[at : at + 1]))
    assert hits == bounds(capacity, uses_of(single(rows))).belady
    assert level.num_expected == 0
    level.check()


def one_by_one(level, rows):
    """Hits, of batches of one row."""
    for row in rows:
        batch = np.array([row])
        level.ask(batch)
        plan = level.plan(batch)
        yield plan.hits
        level.release(plan)


def test_a_level_that_could_not_look_ahead_is_as_it_was(monkeypatch):
    level, rows = Level(POLICIES["gittins"], 40), np.arange(60)
    level.release(level.plan(rows))
    policy, begin = LOOK_AHEAD["gittins"]

    def fails(*_):
        raise MemoryError

    monkeypatch.setitem(LOOK_AHEAD, "gittins", (policy, fails))
    with pytest.raises(MemoryError):
        level.look_ahead()
    level.check()
    level.release(level.plan(rows))
    monkeypatch.setitem(LOOK_AHEAD, "gittins", (policy, begin))
    level.look_ahead()
    level.announce(rows, 0)
    level.release(level.plan(rows))
    level.check()


@pytest.mark.parametrize("capacity", [40, 300, 2000])
def test_a_window_brings_hits_and_never_more_than_belady(capacity):
    trace, sequences, heads = of_text()
    best = bounds(capacity, uses_of(trace)).belady
    blind = simulate("gittins", capacity, *trace).hits
    found = [blind]
    for tokens in (1, 30, 500):
        level = Level(POLICIES["gittins"], capacity)
        found.append(int(replay_ahead(level, trace, windows(trace, sequences, heads, tokens)).sum()))
        assert level.num_expected == 0, "what was announced was asked for"
        level.check()
    assert found[1] > 0.9 * blind
    assert found[2] > blind
    assert 0.99 * found[2] <= found[3] <= best
    assert best - found[3] < 0.5 * (best - blind)


def test_a_window_announces_each_token_once_as_far_ahead_as_it_reaches():
    rows = np.arange(14)
    sequences = np.array([0, 1, 0, 1, 0, 0, 2])
    announced = windows(single(rows), sequences, 2, 2)
    batches = [announced.rows[a:b].tolist() for a, b in zip(announced.offsets[:-1], announced.offsets[1:], strict=True)]
    assert batches[::2] == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9], [], [10, 11], [], [12, 13]]
    assert not any(batches[1::2])
    assert announced.lanes.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [2] * 2


def test_a_replay_is_what_a_level_is_told_and_asked():
    trace, sequences, heads = of_text(num_tokens=800)
    trace = Trace(trace.rows, np.append(np.arange(0, trace.rows.size, 100), trace.rows.size))
    announced = windows(trace, sequences, heads, 20)
    replayed, planned = looking_ahead(150), looking_ahead(150)
    hits = []
    for number, rows in enumerate(trace.batches()):
        told = slice(announced.offsets[number], announced.offsets[number + 1])
        lanes = announced.lanes[told]
        for part in np.split(np.arange(lanes.size), np.flatnonzero(np.diff(lanes)) + 1):
            if part.size:
                planned.announce(announced.rows[told][part], int(lanes[part[0]]))
        planned.ask(rows)
        plan = planned.plan(rows)
        hits.append(plan.hits)
        planned.release(plan)
        planned.check()
    assert replay_ahead(replayed, trace, announced).tolist() == hits
    assert np.array_equal(replayed.slots["key"], planned.slots["key"])
    assert np.array_equal(replayed.counters, planned.counters)


def few_hits():
    """Hits of a short trace, for comparison with uncompiled code."""
    trace, sequences, heads = of_text(num_tokens=160)
    level = Level(POLICIES["gittins"], 70)
    return replay_ahead(level, trace, windows(trace, sequences, heads, 10)).tolist(), level.state.patient.tolist()


def test_jit_off_hits_the_same():
    command = [sys.executable, "-c", "import json, test_ahead; print(json.dumps(test_ahead.few_hits()))"]
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    folder = Path(__file__).parent
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == list(few_hits())


def test_announced_rows_stay_and_what_is_not_comes_and_goes():
    level = looking_ahead(4)
    sum(one_by_one(level, np.arange(4)))
    level.announce(np.array([0, 1, 0]), 0)
    sum(one_by_one(level, np.arange(10, 13)))
    assert {0, 1} <= set(level.slots["key"].tolist())
    assert list(one_by_one(level, np.array([0, 1, 0]))) == [1, 1, 1]


def test_what_never_comes_is_given_up():
    level = looking_ahead(50)
    level.announce(np.arange(1000, 1020), 3)
    level.announce(np.arange(40), 5)
    sum(one_by_one(level, np.arange(100, 4500)))
    assert level.num_expected == 0
    level.check()
    assert not (level.slots["key"] < 100).any()


def test_a_cancelled_lane_protects_nothing_and_leaves_the_others():
    level = looking_ahead(64)
    sum(one_by_one(level, np.arange(64)))
    level.announce(np.arange(0, 30), 0)
    level.announce(np.arange(20, 50), 1)
    level.cancel(0)
    level.check()
    assert level.num_expected == level.num_left(1) == 30
    assert np.flatnonzero(level.state.due).tolist() == list(range(20, 50))
    level.cancel(1)
    assert level.num_expected == 0
    assert not level.state.due.any()


def test_what_there_is_no_room_for_is_not_kept():
    level = Level(POLICIES["gittins"], 10)
    level.look_ahead(room=5)
    assert level.announce(np.arange(3), 0) == 3
    assert level.announce(np.arange(9), 1) == 2
    level.check()
    sum(one_by_one(level, np.arange(3)))
    assert level.num_expected == 2, "rows 0 and 1 were expected twice, and asked for once"
    assert level.announce(np.arange(9), 0) == 3
    level.check()


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - set(LOOK_AHEAD) - {"static", "belady"}))
def test_other_policies_say_that_they_do_not_look_ahead(policy):
    with pytest.raises(ValueError, match=f"'{policy}' does not look ahead; allowed is gittins"):
        Level(POLICIES[policy], 10).look_ahead()
    records = oracle(np.arange(NUM_ROWS), 16)
    with Store.open({"host": {"capacity": 160, "policy": policy}}, tables={"t": records}) as store:
        with pytest.raises(ConfigError, match=f"host.policy = '{policy}': does not look ahead.*'gittins'"):
            store.expect([1, 2])
        assert np.array_equal(store.fetch([1, 2], raw=True).numpy(), records[[1, 2]])


def test_an_engram_expects_the_rows_that_its_lookups_ask_for():
    hasher = demo_hashers(vocabulary=SHIPPED_VOCABULARY, table_vocabularies=(50,) * 2)[0]
    records = oracle(np.arange(hasher.num_rows), 16)
    ids = torch.from_numpy(load_tokens().tokens[:24].reshape(2, 12))
    with Store.open({"host": {"capacity": 100 * 16}}, tables={"t": records}) as store:
        table = TieredEmbedding(store)
        state = EngramState(begun(hasher, 2, ids.device), None)
        expectation = expect(hasher, table, ids, state)
        assert expectation.left == ids.numel() * hasher.num_heads
        for token in range(12):
            rows = look_up(hasher, table, ids[:, token : token + 1], state, None)
            assert expectation.left == (11 - token) * rows.numel()
            assert table(rows).shape[:3] == rows.shape
        store.check()
    assert expect(hasher, torch.nn.Embedding(hasher.num_rows, 8), ids, state) is None


# a store that expects


RECORDS = oracle(np.arange(NUM_ROWS), 264)


class StoreMachine(RuleBasedStateMachine):
    """Expectations come, go, are met and dropped: every byte is exact, and nothing is expected that was not announced."""

    def __init__(self):
        super().__init__()
        self.store, self.held = None, []

    @initialize(
        capacity=st.sampled_from([1, 3, 10, 3 * NUM_ROWS]),
        device=st.sampled_from(["none", "cpu", "streams"]),
        seed=st.integers(0, 2**32),
    )
    def open(self, capacity, device, seed):
        above = None
        if device != "none":
            fake = FakeDevice(random.Random(seed).randrange) if device == "streams" else None
            above = ("gittins", {}, {"device": "cpu", "capacity": 272 * 5, "promotion": 272 * 2}, fake)
        self.fake = above and above[3]
        self.store = open_with("gittins", {}, capacity * 272, {}, {"t": RECORDS, "other": RECORDS}, device=above)
        self.announced = Counter()

    @rule(rows=ROWS, table=st.sampled_from(["t", "other"]))
    def expect(self, rows, table):
        expectation = self.store.expect(np.array(rows, np.int64), table=table)
        assert expectation.left == len(rows)
        self.held.append((expectation, table))
        self.announced.update((table, row) for row in rows)

    @precondition(lambda self: self.held)
    @rule(rows=ROWS)
    def extend(self, rows):
        expectation, table = self.held[-1]
        assert expectation.extend(np.array(rows, np.int64)) == len(rows)
        self.announced.update((table, row) for row in rows)

    @precondition(lambda self: self.held)
    @rule()
    def cancel(self):
        expectation, table = self.held.pop()
        assert repr(expectation) == f"<Expectation of table {table!r}>"
        expectation.cancel()
        expectation.cancel()
        assert repr(expectation) == f"<Expectation of table {table!r}, cancelled>"
        assert expectation.left == 0

    @precondition(lambda self: self.held)
    @rule()
    def drop(self):
        self.held.pop(0)

    @rule(rows=ROWS, table=st.sampled_from(["t", "other"]), early=st.booleans())
    def fetch(self, rows, table, early):
        wanted = np.array(rows, np.int64)
        if early:
            fetched = self.store.prefetch(wanted, table=table).take(raw=True)
        else:
            fetched = self.store.fetch(wanted, table=table, raw=True)
        if self.fake is not None:
            self.fake.run_all()
        assert np.array_equal(fetched.numpy(), RECORDS[wanted])
        self.announced -= Counter((table, row) for row in rows)

    @invariant()
    def nothing_is_expected_that_was_not_announced(self):
        if self.store is not None:
            self.store.check()
            assert self.store._host.level.num_expected <= self.announced.total()

    def teardown(self):
        if self.store is not None:
            self.store.close()


StoreMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestStore = StoreMachine.TestCase


def opened(capacity=10):
    return Store.open({"host": {"capacity": capacity * 264}}, tables={"t": RECORDS})


def test_a_store_keeps_what_it_expects():
    with opened() as store:
        store.fetch(range(10))
        with store.expect([7, 3, 7]) as expectation:
            for row in range(10, 17):
                store.fetch([row])
            before = store.stats().host.hits
            store.fetch([7, 3])
            assert store.stats().host.hits == before + 2
            assert expectation.left == 1
            assert expectation.extend([1, 2]) == 2
            assert expectation.left == 3
        assert expectation.left == 0
        with pytest.raises(RuntimeError, match="cancelled"):
            expectation.extend([1])


def test_what_cannot_be_expected_is_refused_as_by_fetch():
    with opened() as store:
        with pytest.raises(IndexError, match=r"row 40 at position \(1,\) is out of range"):
            store.expect([0, NUM_ROWS])
        with pytest.raises(TypeError, match="integers"):
            store.expect([0.5])
        with pytest.raises(KeyError, match="this store has t"):
            store.expect([0], table="none")
        assert not store._host.level.foresees, "a refused call has changed nothing"
        expectation = store.expect([])
        assert expectation.left == 0
        with pytest.raises(IndexError):
            expectation.extend([-1])
    for call in (lambda: store.expect([1]), lambda: expectation.extend([1])):
        with pytest.raises(ClosedError):
            call()


def test_lanes_of_dropped_expectations_are_used_again(monkeypatch):
    monkeypatch.setattr("tiercache.expectation.MAX_LANES", 3)
    with opened() as store:
        held = [store.expect([number]) for number in range(3)]
        with pytest.raises(RuntimeError, match="3 expectations are in force"):
            store.expect([1])
        held[0].cancel()
        held[0] = store.expect([5])
        held.clear()
        assert [store.expect([number]).left for number in range(6)] == [1] * 6
        assert store._host.level.num_expected == 3
        store.check()


def test_recorded_hits_of_a_live_store_are_those_of_a_level():
    rows = zipf_trace(600, num_rows=NUM_ROWS)
    level = looking_ahead(10, NUM_ROWS)
    level.announce(rows, 0)
    hits = sum(one_by_one(level, rows))
    with opened() as store:
        store.expect(rows)
        for row in rows.tolist():
            store.fetch([row])
        assert store.stats().host.hits == hits == level.counters[HITS]


def test_an_expectation_that_is_cancelled_meanwhile_extends_nobody_elses(monkeypatch):
    with opened() as store:
        first = store.expect([1, 2])
        rows_of, others, calls = store_module.rows_of, [], []

        def cancelled(*arguments):
            calls.append(arguments)
            if len(calls) == 1:
                first.cancel()
                others.append(store.expect([3]))
            return rows_of(*arguments)

        monkeypatch.setattr(store_module, "rows_of", cancelled)
        with pytest.raises(RuntimeError, match="cancelled before"):
            first.extend([4, 5])
        assert (first.left, others[0].left) == (0, 1)
