"""Curves over traces: LRU at every capacity against the simulator and a list, and samples against whole traces."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.lab.bounds import bounds, uses_of
from tiercache.lab.curves import curves
from tiercache.lab.distances import lru_hits
from tiercache.lab.plot import plot_curves
from tiercache.lab.sampling import lru_curve, num_accesses, sample
from tiercache.lab.simulator import simulate
from tiercache.lab.trace import Trace, single

batches_of_rows = st.lists(st.lists(st.integers(0, 20), max_size=12), max_size=25)


def trace_of(batches):
    rows = np.array([row for batch in batches for row in batch], np.int64)
    return Trace(rows, np.cumsum([0, *map(len, batches)], dtype=np.int64))


def zipf(num_uses, num_rows, seed=0, exponent=1.1):
    rows = np.random.default_rng(seed).zipf(exponent, num_uses) % num_rows
    return rows.astype(np.int64)


def hits_by_list(batches, capacity):
    """Hits where a batch sees the rows used last before it began, and its rows count as used in first-seen order."""
    used, hits = [], 0
    for batch in batches:
        hits += len(set(batch) & set(used[:capacity]))
        for row in dict.fromkeys(batch):
            if row in used:
                used.remove(row)
            used.insert(0, row)
    return hits


@given(st.lists(st.integers(0, 25), max_size=120), st.sampled_from([1, 10**6, 10**15]))
def test_one_pass_counts_what_lru_counts_at_every_capacity(rows, factor):
    rows = np.array(rows, np.int64) * factor
    hits = lru_hits(rows)
    distinct = np.unique(rows).size
    assert hits.size == distinct + 1
    assert hits[0] == 0
    assert hits[1:].tolist() == [simulate("lru", capacity, rows).hits for capacity in range(1, distinct + 1)]


@given(batches_of_rows)
def test_batches_are_counted_as_the_list_says(batches):
    trace = trace_of(batches)
    assert lru_hits(*trace).tolist() == [hits_by_list(batches, capacity) for capacity in range(np.unique(trace.rows).size + 1)]


@pytest.mark.parametrize("exponent", [1.02, 1.5, 3.0])
def test_a_long_trace_fills_and_outgrows_the_tree(exponent):
    rows = zipf(60_000, 20_000, exponent=exponent)
    hits = lru_hits(rows)
    assert hits.size == np.unique(rows).size + 1
    for capacity in {1, 7, hits.size // 3, hits.size - 1}:
        assert hits[capacity] == simulate("lru", capacity, rows).hits


def test_a_batch_longer_than_the_tree_is_one_batch():
    rows = np.concatenate([np.arange(10_000), np.arange(10_000), np.arange(5)])
    offsets = np.array([0, 10_000, 20_000, 20_005])
    hits = lru_hits(rows, offsets)
    assert hits[[9_999, 10_000]].tolist() == [9_999 + 4, 10_000 + 5]


def test_a_store_of_batches_is_close_to_the_curve_of_batches():
    rows = zipf(200_000, 30_000)
    offsets = np.append(np.arange(0, rows.size, 200), rows.size)
    hits = lru_hits(rows, offsets)
    for capacity in (1000, 5000):
        counts = simulate("lru", capacity, rows, offsets)
        assert abs(hits[capacity] - counts.hits) < 0.002 * counts.accesses


@given(batches_of_rows)
def test_accesses_are_the_distinct_rows_of_each_batch(batches):
    assert num_accesses(*trace_of(batches)) == sum(len(set(batch)) for batch in batches)


def test_a_sample_has_all_uses_of_its_rows_in_order():
    rows = zipf(20_000, 5000)
    offsets = np.append(np.arange(0, rows.size, 37), rows.size)
    sampled = sample(rows, offsets, rate=0.1)
    inside = np.isin(rows, sampled.rows)
    assert np.array_equal(sampled.rows, rows[inside])
    assert np.unique(sampled.rows).size == pytest.approx(0.1 * np.unique(rows).size, rel=0.2)
    assert sampled.offsets.tolist() == [int(inside[:at].sum()) for at in offsets.tolist()]
    assert sampled.accesses == pytest.approx(0.1 * num_accesses(rows, offsets))
    assert np.array_equal(sample(rows, rate=0.1).rows, sampled.rows)


def test_a_sample_of_everything_is_the_trace():
    rows = zipf(3000, 500)
    curve = lru_curve(rows)
    exact = lru_hits(rows)
    assert curve.hit_rate(np.arange(exact.size)).tolist() == pytest.approx((exact / rows.size).tolist())
    assert curve.hit_rate(10**9) == pytest.approx(exact[-1] / rows.size)


@pytest.mark.parametrize("batch", [None, 300])
def test_a_tenth_of_the_rows_has_nearly_the_curve_of_all(batch):
    rows = zipf(400_000, 200_000, exponent=1.05)
    offsets = None if batch is None else np.append(np.arange(0, rows.size, batch), rows.size)
    exact, sampled = (lru_curve(rows, offsets, rate=rate) for rate in (1.0, 0.1))
    sizes = np.geomspace(200, exact.hits.size, 12).astype(np.int64)
    assert np.abs(exact.hit_rate(sizes) - sampled.hit_rate(sizes)).mean() < 0.01


def test_curves_of_a_sample_are_near_those_of_the_trace(tmp_path):
    trace = single(zipf(300_000, 150_000, exponent=1.05))
    shares, policies = (0.02, 0.1, 0.5), ("lru", "s3fifo", "lfu")
    whole, part = (curves(trace, shares, policies, rate=rate) for rate in (1.0, 0.1))
    assert part.touched_rows == pytest.approx(whole.touched_rows, rel=0.03)
    for policy in policies:
        pairs = zip(whole.policies[policy], part.policies[policy], strict=True)
        assert np.mean([abs(exact.hit_rate - sampled.hit_rate) for exact, sampled in pairs]) < 0.015
    for exact, sampled in zip(whole.bounds, part.bounds, strict=True):
        assert sampled.belady / sampled.accesses == pytest.approx(exact.belady / exact.accesses, abs=0.015)
    plot_curves(tmp_path / "curves.png", part, record_bytes=264, title="a tenth")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_sampled_policy_is_a_smaller_tier_over_the_sample():
    """With the difference between what was sampled and what was to be expected taken for hits."""
    trace = single(zipf(50_000, 20_000))
    part = curves(trace, (0.1,), ("arc",), rate=0.05)
    sampled = sample(trace.rows, rate=0.05)
    slots = max(1, round(part.capacities[0] * sampled.rate))
    counts = simulate("arc", slots, sampled.rows)
    assert part.policies["arc"][0].accesses == round(sampled.accesses)
    assert part.policies["arc"][0].hits == counts.hits + round(sampled.accesses) - sampled.rows.size
    limits = bounds(slots, uses_of(single(sampled.rows)))
    assert part.bounds[0].belady - part.policies["arc"][0].hits == limits.belady - counts.hits


@pytest.mark.parametrize("rate", [0, -0.1, 1.5, float("nan")])
def test_a_rate_is_a_share(rate):
    with pytest.raises(ValueError, match=r"rate = .*: allowed are shares above 0, up to 1"):
        sample(np.arange(10), rate=rate)


def test_no_trace_has_no_hits():
    nothing = np.empty(0, np.int64)
    assert lru_hits(nothing).tolist() == [0]
    assert lru_curve(nothing).hit_rate([1, 10]).tolist() == [0, 0]
    assert lru_hits(nothing, np.zeros(1, np.int64)).tolist() == [0]
