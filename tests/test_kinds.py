"""Misses by kind of rows and windows of a trace, against what a list says; where each family's orders begin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.config import StoreConfig
from tiercache.engram.families import FAMILIES, hashed, order_edges
from tiercache.lab.bounds import uses_of
from tiercache.lab.kinds import Kinds, by_table, everything
from tiercache.lab.simulator import simulate
from tiercache.lab.synthetic import shifting
from tiercache.lab.tiers import simulate_kinds, simulate_tiers
from tiercache.lab.trace import Trace
from tiercache.lab.windows import windows
from tiercache.level import Level
from tiercache.policies import POLICIES
from tiercache.recording.blocks import RecordedTable

batches_of_rows = st.lists(st.lists(st.integers(0, 30), max_size=12), min_size=1, max_size=25)
KINDS = Kinds(("a", "b", "c"), np.array([0, 7, 8, 31]))


def trace_of(batches):
    rows = np.array([row for batch in batches for row in batch], np.int64)
    return Trace(rows, np.cumsum([0, *map(len, batches)], dtype=np.int64))


def kind_of(row):
    return 0 if row < 7 else 1 if row < 8 else 2


@given(batches_of_rows, st.integers(1, 12), st.sampled_from(["lru", "s3fifo"]))
def test_misses_are_counted_by_kind(batches, capacity, policy):
    trace = trace_of(batches)
    _, missed = Level(POLICIES[policy], capacity).replay(*trace, KINDS.edges)
    level, wanted = Level(POLICIES[policy], capacity), [0, 0, 0]
    for rows in trace.batches():
        plan = level.plan(rows)
        for row in plan.misses.tolist():
            wanted[kind_of(row)] += 1
        level.release(plan)
    assert missed.tolist() == wanted
    assert missed.sum() == simulate(policy, capacity, *trace).misses
    uses = uses_of(trace)
    accesses = [sum(kind_of(row) == kind for batch in batches for row in set(batch)) for kind in range(3)]
    assert KINDS.accesses(uses).tolist() == accesses
    assert KINDS.sizes(uses.rows).tolist() == np.bincount([kind_of(row) for row in uses.rows], minlength=3).tolist()


def test_misses_of_two_tiers_are_those_of_a_table_alone():
    """Tables that never meet in a batch, in tiers that hold everything: each misses what it asks for first, and rises again."""
    config = StoreConfig.load({"device": {"device": "cpu", "capacity": 16 * 1000}, "host": {"capacity": 16 * 1000}})
    tables = [RecordedTable("a", 300, 8, ""), RecordedTable("b", 700, 8, "")]
    first, second = (
        Trace(shifting(size, batches=100, size=20).rows + base, np.arange(0, 2001, 20)) for size, base in ((300, 0), (700, 300))
    )
    both = Trace(np.concatenate([first.rows, second.rows]), np.arange(0, 4001, 20))
    counted, missed = simulate_kinds(config, tables, both, by_table(["a", "b"], [300, 700]))
    assert counted == simulate_tiers(config, tables, both)
    device, host = counted
    assert (missed.missed_above.sum(), missed.missed.sum()) == (device.counts.misses, host.counts.misses)
    for kind, part in enumerate((first, second)):
        (above, below), alone = simulate_kinds(config, tables, part, everything("all"))
        assert missed.missed[kind] == alone.missed[0] == below.counts.misses == np.unique(part.rows).size
        assert missed.missed_above[kind] == alone.missed_above[0] == above.counts.misses


@given(batches_of_rows, st.integers(1, 70))
def test_windows_are_what_a_set_says(batches, count):
    trace = trace_of(batches)
    found = windows(uses_of(trace), count)
    seen, begin = set(), 0
    for number, end in enumerate(found.batches.tolist()):
        rows = {row for batch in batches[begin:end] for row in batch}
        assert found.accesses[number] == sum(len(set(batch)) for batch in batches[begin:end]) > 0
        assert found.distinct[number] == len(rows)
        assert found.fresh[number] == len(rows - seen)
        seen |= rows
        assert found.cumulative[number] == len(seen)
        begin = end
    assert len(found.batches) <= count
    assert not any(batches[begin:]), "all batches are in a window"


def test_windows_have_about_as_many_accesses_each():
    found = windows(uses_of(shifting(5000, batches=640, size=30)), 64)
    assert found.accesses.size == 64
    assert found.accesses.max() < 1.3 * found.accesses.min()


@pytest.mark.parametrize("family", FAMILIES)
def test_orders_begin_where_their_heads_do(family):
    num_rows = 50_000 if family == "demo" else None
    edges = order_edges(family, vocabulary=5000, num_rows=num_rows)
    tokens = np.random.default_rng(0).integers(0, 5000, 400)
    rows = hashed(family, tokens, np.array([400]), vocabulary=5000, num_rows=num_rows)
    orders = edges.size - 1
    assert rows.shape[1] % orders == 0
    wanted = np.repeat(np.arange(orders), rows.shape[1] // orders)
    found = np.searchsorted(edges, rows, side="right") - 1
    assert (found == wanted).all()
