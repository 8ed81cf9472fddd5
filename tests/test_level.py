"""The books of a tier: plans against a model, numbers that wrap around, rows forgotten, and the large outputs of its buffer."""


import numpy as np
import pytest
from golden_policies import options_of, zipf_trace

from tiercache.level import BATCH, BYPASSES, HITS, MISSES, PINNED, Level, drop, new_plan
from tiercache.policies import POLICIES
from tiercache.policies.base import EMPTY
from tiercache.testing import oracle
from tiercache.tiers import host
from tiercache.tiers.host import HostTier

NUM_ROWS = 300


def distinct(rows):
    """Distinct rows in first-seen order."""
    return list(dict.fromkeys(rows.tolist()))


def batches_of(seed, count=120):
    """Batches of any size, skewed, some empty, some of one row many times."""
    random = np.random.default_rng(seed)
    trace = zipf_trace(20_000, num_rows=NUM_ROWS, seed=seed)
    for _ in range(count):
        size = int(random.choice([0, 1, 2, 5, 40, 200]))
        start = int(random.integers(0, trace.size - size))
        yield np.repeat(trace[start : start + size], int(random.choice([1, 1, 3])))


def level_of(policy, capacity, num_rows=None, seed=0):
    return Level(POLICIES[policy], capacity, options_of(policy, capacity, zipf_trace(20_000, NUM_ROWS, seed)), num_rows)


def parts(plan):
    """All that a plan says."""
    return [part.tolist() for part in (plan.where, plan.misses, plan.fill, plan.held, plan.counts)]


class Model:
    """What a level must keep, whatever its policy decides: rows by slot, pins by slot, counts."""

    def __init__(self, capacity):
        self.rows = [None] * capacity
        self.pins = [0] * capacity
        self.hits = self.misses = self.bypasses = 0
        self.plans = []

    def follow(self, rows, plan, num_reads, level):
        """Assert that a plan is one that keeps every promise, and take over what it decided."""
        wanted = distinct(rows)
        slot_of = {row: slot for slot, row in enumerate(self.rows) if row is not None}
        resident = [row for row in wanted if row in slot_of]
        missing = [row for row in wanted if row not in slot_of]
        assert plan.misses.tolist() == missing
        assert plan.hits == len(resident)
        places = {row: slot_of[row] for row in resident} | dict(zip(missing, plan.fill.tolist(), strict=True))
        assert plan.where.tolist() == [places[row] for row in rows.tolist()]
        filled = [slot for slot in plan.fill.tolist() if slot >= 0]
        assert plan.held.tolist() == [slot_of[row] for row in resident] + filled
        assert [~place for place in plan.fill.tolist() if place < 0] == list(range(plan.staged))
        for row in resident:
            self.pins[slot_of[row]] += 1
        for row, slot in zip(missing, plan.fill.tolist(), strict=True):
            if slot >= 0:
                assert self.pins[slot] == 0, "a pinned slot was handed out"
                self.rows[slot], self.pins[slot] = row, 1
                assert level.slots["pending"][slot] == num_reads
        self.hits += len(resident)
        self.misses += len(missing)
        self.bypasses += plan.staged
        self.plans.append(plan)

    def release(self, number, level):
        plan = self.plans.pop(number)
        for slot in plan.held.tolist():
            self.pins[slot] -= 1
        for _ in range(2):
            level.release(plan)

    def forget(self, plan, level):
        for slot in plan.held[plan.hits :].tolist():
            self.rows[slot] = None
        for _ in range(2):
            level.forget(plan)

    def compare(self, level):
        level.check()
        assert level.slots["key"].tolist() == [EMPTY if row is None else row for row in self.rows]
        assert level.slots["pins"].tolist() == self.pins
        assert level.counters[[HITS, MISSES, BYPASSES, PINNED]].tolist() == [
            self.hits,
            self.misses,
            self.bypasses,
            sum(pins > 0 for pins in self.pins),
        ]


@pytest.mark.parametrize("capacity", [1, 2, 7, 100, NUM_ROWS])
@pytest.mark.parametrize("policy", POLICIES)
def test_plans_keep_their_promises(policy, capacity):
    random = np.random.default_rng(capacity)
    level, model = level_of(policy, capacity, NUM_ROWS), Model(capacity)
    for rows in batches_of(capacity):
        num_reads = int(random.integers(0, 3))
        plan = level.plan(rows, num_reads)
        model.follow(rows, plan, num_reads, level)
        if random.random() < 0.1:
            model.forget(plan, level)
        while model.plans and random.random() < 0.6:
            model.release(int(random.integers(0, len(model.plans))), level)
        model.compare(level)
    while model.plans:
        model.release(0, level)
    model.compare(level)
    level.release(new_plan(5))
    model.compare(level)
    assert model.hits > 0
    assert not any(model.pins)


@pytest.mark.parametrize("capacity", [1, 7, 76, 100])
@pytest.mark.parametrize("policy", POLICIES)
def test_direct_map_and_hashed_index_give_the_same_plans(policy, capacity):
    hashed = level_of(policy, capacity)
    direct = level_of(policy, capacity, 4 * capacity)
    assert direct.table.dtype != hashed.table.dtype
    for rows in batches_of(1):
        plans = [level.plan(rows % (4 * capacity), 1) for level in (hashed, direct)]
        assert parts(plans[0]) == parts(plans[1])
        for level, plan in zip((hashed, direct), plans, strict=True):
            level.slots["pending"] = 0
            for slot in plan.held[plan.hits :][::5].tolist():
                drop(level.slots, level.table, slot)
            level.release(plan)
    assert np.array_equal(hashed.slots, direct.slots)
    assert np.array_equal(hashed.counters, direct.counters)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_number_of_the_batch_wraps_around(policy):
    young, old = level_of(policy, 30, NUM_ROWS), level_of(policy, 30, NUM_ROWS)
    for number, rows in enumerate(batches_of(2)):
        if number == 10:
            old.counters[BATCH] = 2**31 - 3
            old.seen[:] = 0
        plans = [level.plan(rows) for level in (young, old)]
        assert parts(plans[0]) == parts(plans[1])
        for level, plan in zip((young, old), plans, strict=True):
            level.release(plan)
            level.check()
    assert 0 < old.counters[BATCH] < young.counters[BATCH]


def test_a_stamp_of_before_the_wrap_does_not_count_as_used():
    level = level_of("lru", 4)
    rows = np.array([5, 6], np.int64)
    level.counters[BATCH] = 0
    level.release(level.plan(rows))
    level.counters[BATCH] = 2**31 - 1
    plan = level.plan(rows)
    assert level.counters[BATCH] == 1
    assert plan.hits == 2
    level.release(plan)


def test_a_resident_row_of_a_batch_is_not_evicted_by_the_batch():
    for policy in POLICIES:
        level = level_of(policy, 4, NUM_ROWS)
        level.release(level.plan(np.arange(4)))
        resident = [row for row in range(4) if row in level.slots["key"]]
        plan = level.plan(np.append(np.arange(100, 200), np.array(resident, np.int64)))
        assert plan.hits == len(resident)
        assert level.slots["key"][plan.where[100:]].tolist() == resident
        level.release(plan)


def test_a_tier_whose_slots_are_all_pinned_keeps_nothing_more():
    for policy in POLICIES:
        level = level_of(policy, 5, NUM_ROWS)
        hot = options_of(policy, 5, zipf_trace(20_000, NUM_ROWS)).get("hot_rows", np.arange(5))
        first = level.plan(np.asarray(hot, np.int64))
        if level.counters[PINNED] < 5:
            level.release(first)
            continue
        second = level.plan(np.arange(NUM_ROWS)[::-1].copy())
        assert second.staged == second.misses.size == NUM_ROWS - 5
        assert (second.where[np.isin(np.arange(NUM_ROWS)[::-1], hot)] >= 0).all()
        level.release(first)
        level.release(second)


def test_slots_whose_bytes_are_on_their_way_are_counted():
    level = level_of("lru", 10)
    first = level.plan(np.array([1, 2, 3]), 2)
    assert level.plan(np.array([3, 3, 9, 1]), 2).pending == 2
    level.slots["pending"][first.held[0]] = 0
    assert level.plan(np.array([1, 2]), 2).pending == 1
    level.forget(first)
    assert level.plan(np.array([1, 2])).hits == 0


@pytest.mark.parametrize("num_rows", [None, 40])
def test_rows_that_were_dropped_are_read_again(num_rows):
    level = level_of("sieve", 10, num_rows)
    first = level.plan(np.arange(10))
    for position in (0, 4, 9, 0):
        drop(level.slots, level.table, first.held[position])
    level.check()
    second = level.plan(np.arange(10))
    assert second.misses.tolist() == [0, 4, 9]
    assert second.staged == 3
    level.release(first)
    level.release(second)
    third = level.plan(np.arange(10))
    assert third.misses.tolist() == [0, 4, 9]
    assert third.staged == 0
    level.release(third)


def test_replay_is_plan_after_plan():
    for policy in POLICIES:
        replayed, planned = level_of(policy, 50, NUM_ROWS), level_of(policy, 50, NUM_ROWS)
        batches = list(batches_of(3))
        hits = []
        for rows in batches:
            plan = planned.plan(rows)
            hits.append(plan.hits)
            planned.release(plan)
        offsets = np.append(0, np.cumsum([rows.size for rows in batches]))
        replayed_hits, _ = replayed.replay(np.concatenate(batches), offsets)
        assert replayed_hits.tolist() == hits
        assert np.array_equal(replayed.counters, planned.counters)
        assert np.array_equal(replayed.slots["key"], planned.slots["key"])


# the buffer of the tier


@pytest.fixture
def streamed(monkeypatch) -> list[int]:
    """Number of positions of each gather that went past the caches."""
    calls: list[int] = []
    original = host._gather_streaming

    def gather_streaming(where, *rest):
        calls.append(where.size)
        original(where, *rest)

    monkeypatch.setattr(host, "_gather_streaming", gather_streaming)
    return calls


def gathered(num_bytes, num_positions, skew):
    """Gather slots and staging rows to an output `skew` bytes behind a cache line; whether it is exact."""
    stride, capacity, staged = -(-num_bytes // 8) * 8, 61, 7
    tier = HostTier(Level(POLICIES["lru"], capacity), stride)
    tier.buffer.slots[:, :num_bytes] = oracle(np.arange(capacity), num_bytes)
    staging = np.zeros((staged, stride), np.uint8)
    staging[:, :num_bytes] = oracle(capacity + np.arange(staged), num_bytes)
    random = np.random.default_rng(num_positions)
    where = random.integers(-staged, capacity, num_positions).astype(np.int32)
    if num_positions > 1:
        where[0], where[-1] = -1, -staged
    memory = np.full(num_positions * num_bytes + 256, 0xEE, np.uint8)
    begin = -memory.ctypes.data % 64 + skew
    end = begin + num_positions * num_bytes
    memories = host.Memories(0, 0, tier.at.address, staging.ctypes.data, stride)
    host.gather_to(where, memories, memory.ctypes.data + begin, num_bytes)
    rows = np.where(where >= 0, where, capacity + ~where.astype(np.int64))
    expected = oracle(np.arange(capacity + staged), num_bytes)[rows]
    exact = np.array_equal(memory[begin:end].reshape(num_positions, num_bytes), expected)
    return exact and (memory[:begin] == 0xEE).all() and (memory[end:] == 0xEE).all()


@pytest.mark.parametrize("num_bytes", [1, 7, 8, 64, 264, 2047, 2048])
def test_large_outputs_are_exact(streamed, num_bytes):
    around = -(-host._LARGE_BYTES // num_bytes)
    for num_positions in (around, around + 1, around + 9, around + 64):
        assert gathered(num_bytes, num_positions, 0)
    assert streamed == [around, around + 1, around + 9, around + 64]


@pytest.mark.parametrize("num_bytes", [2049, 2112, 4096, 5000])
@pytest.mark.parametrize("skew", [0, 8, 63])
def test_wide_records_are_exact(streamed, num_bytes, skew):
    around = -(-host._LARGE_BYTES // num_bytes)
    for num_positions in (0, 1, 2, host._WIDE_AHEAD, around - 1, around, around + 9):
        assert gathered(num_bytes, num_positions, skew)
    assert not streamed


@pytest.mark.parametrize("num_bytes", [1, 8, 264, 2047, 2048, 2049, 5000])
def test_outputs_that_are_not_streamed_are_exact(streamed, num_bytes):
    around = -(-host._LARGE_BYTES // num_bytes)
    for num_positions in (0, 1, 2, 63, around - 1):
        assert gathered(num_bytes, num_positions, 0)
    for skew in (1, 8, 63):
        assert gathered(num_bytes, around, skew)
    assert not streamed
    if num_bytes > 2048:
        assert gathered(num_bytes, around, 0)
        assert not streamed
