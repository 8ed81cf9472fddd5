import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_policies import CAPACITIES, GOLDEN, all_misses, count_misses, options_of, zipf_trace
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from policy_models import MODELS

from tiercache.engram.demo import demo_hashers
from tiercache.lab.simulator import simulate
from tiercache.lab.tokens import SHIPPED_VOCABULARY, load_tokens
from tiercache.level import SLOT
from tiercache.policies import DEFAULT, POLICIES, gittins, keyset, lfu, s3fifo, static, wtinylfu
from tiercache.policies.base import BYPASS, EMPTY, MAX_PINNED_VICTIMS, on_hit, on_miss


class Driver:
    """What drives a policy, in a dict: one key at a time, pins on request."""

    def __init__(self, name, capacity, **options):
        self.policy = POLICIES[name]
        self.state = self.policy.init(capacity, **options)
        self.slots = np.zeros(capacity, SLOT)
        self.keys, self.pins = self.slots["key"], self.slots["pins"]
        self.keys[:] = EMPTY
        self.slot_of = {}

    def use(self, key):
        """(hit, slot or BYPASS)."""
        if key in self.slot_of:
            on_hit(self.state, self.keys, self.slot_of[key])
            return True, self.slot_of[key]
        slot = on_miss(self.state, self.keys, self.pins, key)
        if slot != BYPASS:
            assert self.pins[slot] == 0
            self.fail(slot)
            self.keys[slot] = key
            self.slot_of[key] = slot
        return False, slot

    def fail(self, slot):
        """The slot holds nothing any more."""
        self.slot_of.pop(int(self.keys[slot]), None)
        self.keys[slot] = EMPTY

    def check(self):
        self.policy.check(self.state, self.keys)


def short_trace(capacity, seed=0, num_accesses=1500):
    return zipf_trace(num_accesses, num_rows=3 * capacity + 5, seed=seed).tolist()


def model_options(name, capacity):
    return {"hot_rows": list(range(0, 3 * capacity, 2))} if name == "static" else {}


def assert_equal_slot_by_slot(driver, model, keys):
    """Both are told of the same keys, and give them the same slots."""
    for key in keys:
        before = driver.keys.tolist()
        hit, slot = driver.use(key)
        if hit:
            model.hit(before, slot)
        else:
            assert slot == model.miss(before, set(), key)
    driver.check()


@pytest.mark.parametrize("capacity", [1, 2, 3, 17, 100])
@pytest.mark.parametrize("name", MODELS)
def test_equals_its_model_slot_by_slot(name, capacity):
    options = model_options(name, capacity)
    assert_equal_slot_by_slot(Driver(name, capacity, **options), MODELS[name](capacity, **options), short_trace(capacity))


@pytest.mark.parametrize("capacity", [1, 2, 3, 17, 100])
@pytest.mark.parametrize("name", MODELS)
def test_equals_its_model_under_pins_and_failed_reads(name, capacity):
    options = model_options(name, capacity)
    driver, model = Driver(name, capacity, **options), MODELS[name](capacity, **options)
    rng = np.random.default_rng(capacity)
    for step, key in enumerate(short_trace(capacity, seed=1)):
        if step % 10 == 0:
            filled = np.flatnonzero(driver.keys != EMPTY)
            driver.pins[:] = 0
            driver.pins[rng.choice(filled, int(rng.integers(0, filled.size + 1)), replace=False)] = 1
        before, pinned = driver.keys.tolist(), set(np.flatnonzero(driver.pins).tolist())
        hit, slot = driver.use(key)
        if hit:
            model.hit(before, slot)
        else:
            assert slot == model.miss(before, pinned, key)
        if not hit and slot != BYPASS and rng.random() < 0.05:
            driver.fail(slot)
        if step % 50 == 0:
            driver.check()


@pytest.mark.parametrize("capacity", [1, 2, 3, 17, 100])
def test_belady_evicts_what_is_needed_last(capacity):
    trace = short_trace(capacity)
    driver = Driver("belady", capacity, future=(trace, range(len(trace) + 1)))
    resident = set()
    for now, key in enumerate(trace):
        rest = trace[now + 1 :]
        assert driver.use(key)[0] == (key in resident)
        if key not in resident and len(resident) == capacity:
            resident.remove(max(resident, key=lambda row: rest.index(row) if row in rest else len(rest)))
        resident.add(key)
    driver.check()


def test_belady_is_no_worse_than_any_policy_in_batches():
    rows = zipf_trace(4000, num_rows=600)
    misses = {name: count_misses(name, 100, rows, batch=20) for name in POLICIES}
    assert misses["belady"] == min(misses.values())


def test_belady_takes_a_key_that_the_future_does_not_know_as_never_used_again():
    driver = Driver("belady", 2, future=([1, 2, 3, 1, 2], range(6)))
    driver.use(1)
    driver.use(99)
    driver.use(2)
    assert sorted(driver.slot_of) == [1, 2]


@pytest.mark.parametrize("name", POLICIES)
def test_slots_are_handed_out_in_order_and_pinned_ones_never(name):
    num_slots = MAX_PINNED_VICTIMS + 10
    keys = list(range(2 * num_slots))
    options = {"hot_rows": keys} if name == "static" else options_of(name, num_slots, np.array(keys))
    driver = Driver(name, num_slots, **options)
    assert [driver.use(key)[1] for key in keys[:num_slots]] == list(range(num_slots))
    driver.pins[:] = 1
    assert {driver.use(key)[1] for key in keys[num_slots:]} == {BYPASS}
    driver.check()
    driver.pins[:] = 0
    assert name == "static" or driver.use(keys[-1])[1] != BYPASS
    driver.check()


@pytest.mark.parametrize("name", POLICIES)
def test_golden_misses(name):
    rows = zipf_trace(20_000)
    assert tuple(count_misses(name, capacity, rows) for capacity in CAPACITIES) == GOLDEN[name]


@pytest.mark.parametrize("name", POLICIES)
def test_a_level_counts_what_one_key_at_a_time_counts(name):
    rows = zipf_trace(3000, num_rows=500)
    driver = Driver(name, 50, **options_of(name, 50, rows))
    assert count_misses(name, 50, rows) == sum(not driver.use(key)[0] for key in rows.tolist())


@pytest.mark.parametrize(
    ("name", "peer", "options"),
    [
        ("fifo", "FIFO", {}),
        ("lru", "LRU", {}),
        ("lfu", "LFU", {}),
        ("sieve", "Sieve", {}),
        ("s3fifo", "S3FIFO", {"small": 0.10, "ghost": 0.90, "threshold": 2}),
        ("arc", "ARC", {}),
    ],
)
def test_misses_equal_those_of_libcachesim(name, peer, options):
    libcachesim = pytest.importorskip("libcachesim", reason="libcachesim has no wheel for this platform")
    keys = zipf_trace(20_000).tolist()
    for capacity in (20, 137, 1000):
        driver = Driver(name, capacity, **options)
        theirs = getattr(libcachesim, peer)(cache_size=capacity, hashpower=14)
        ours = sum(not driver.use(key)[0] for key in keys)
        request = libcachesim.Request(obj_id=0, obj_size=1)
        misses = 0
        for key in keys:
            request.obj_id = key + 1
            misses += not theirs.get(request)
        assert ours == misses


def test_jit_off_counts_the_same():
    arguments = [1500, [3, 40], 5]
    script = Path(__file__).with_name("golden_policies.py")
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(script), json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == all_misses(*arguments)


def test_lfu_keeps_its_books_when_no_ring_is_free(monkeypatch):
    monkeypatch.setattr(lfu, "MAX_RINGS", 2)
    driver = Driver("lfu", 5)
    for key in (0, 1, 2, 3, 4, 0, 0, 0, 1, 1, 2, 0, 1, 2, 5, 6):
        driver.use(key)
        driver.check()
    assert {0, 1, 2} < set(driver.slot_of)


def test_s3fifo_ghost_sends_a_returning_key_to_the_main_queue():
    driver = Driver("s3fifo", 10, small=0.3, ghost=1.0)
    for key in range(11):
        driver.use(key)
    assert 0 not in driver.slot_of
    driver.use(0)
    for key in range(20, 30):
        driver.use(key)
    assert 0 in driver.slot_of


@pytest.mark.parametrize("start", [0, 2**39 - 9 * 1024, 2**45 - 1024])
@pytest.mark.parametrize("capacity", [1, 5, 40, 300])
def test_gittins_equals_its_model_while_it_learns(capacity, start):
    """Also after years of service: what a slot and a sample remember of the time goes round."""
    driver, model = Driver("gittins", capacity), MODELS["gittins"](capacity)
    driver.state.book[gittins._INTERVAL] = model.interval = 128
    driver.state.book[gittins._CLOCK] = model.now = start
    driver.state.seen[:], model.seen = start, [start] * 64
    parts = zipf_trace(20_000, 4 * capacity + 5, seed=2), np.arange(1000), zipf_trace(5000, 2 * capacity, seed=3)
    assert_equal_slot_by_slot(driver, model, np.concatenate(parts).tolist())
    assert np.array_equal(driver.state.returns, model.returns)
    assert np.array_equal(driver.state.reached, model.reached)
    assert np.abs(driver.state.worth - np.array(model.worth)).max() <= 1
    assert not np.array_equal(driver.state.worth, gittins._first_guess())


def test_gittins_keeps_a_newcomer_out_where_what_has_no_pin_is_worth_more():
    driver = Driver("gittins", 40)
    for key in 2 * list(range(40)):
        driver.use(key)
    state, free = driver.state, 7
    state.worth[:] = 1
    driver.pins[:] = 1
    driver.pins[free] = 0
    state.worth[int(state.words[free]) & 63] = 3
    newcomer = state.worth[1 << 2 | 3]
    newcomer[0] = 2
    assert driver.use(100)[1] == BYPASS
    assert gittins._recall(state, 100, keyset.mix(101)) == 1, "its use is not remembered"
    newcomer[0] = 3
    assert driver.use(101)[1] == free
    driver.pins[:] = 0
    newcomer[0] = 0
    assert driver.use(102)[1] != BYPASS
    driver.check()


@pytest.mark.parametrize("batch", [1, 8192])
def test_the_default_misses_less_on_text_than_every_other_policy(batch):
    """Also in a tier that a batch fills."""
    stream = load_tokens().first(60_000)
    rows = demo_hashers(vocabulary=SHIPPED_VOCABULARY)[0].rows(stream.tokens, stream.documents).reshape(-1)
    batches = np.append(np.arange(0, rows.size, batch), rows.size)
    for capacity in (1000, 6000, 20_000):
        misses = {name: simulate(name, capacity, rows, batches).misses for name in POLICIES if name not in ("belady", "static")}
        assert min(misses, key=misses.__getitem__) == DEFAULT


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (s3fifo, {"small": 0}),
        (s3fifo, {"small": 1.0}),
        (s3fifo, {"ghost": -0.1}),
        (s3fifo, {"ghost": math.inf}),
        (s3fifo, {"ghost": math.nan}),
        (s3fifo, {"ghost": 1e300}),
        (s3fifo, {"ghost": 10**400}),
        (s3fifo, {"small": math.nan}),
        (s3fifo, {"threshold": 4}),
        (wtinylfu, {"window": 1.1}),
        (wtinylfu, {"protected": -1}),
        (wtinylfu, {"period": 0}),
        (wtinylfu, {"period": math.nan}),
        (wtinylfu, {"period": math.inf}),
        (wtinylfu, {"period": 1e300}),
        (wtinylfu, {"period": 2**63}),
        (wtinylfu, {"window": math.nan}),
        (static, {"hot_rows": [3, -1]}),
    ],
)
def test_a_parameter_out_of_range_is_named(module, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} (is|has) {re.escape(str(value))}" if name != "hot_rows" else name):
        module.init(10, **options)


def test_sketch_counts_at_least_the_truth_and_ages():
    state = wtinylfu.init(1000, period=200)
    for key in range(100):
        for _ in range(key % 20):
            wtinylfu.count(state, key)
    estimates = [wtinylfu.estimate(state, key) for key in range(100)]
    assert all(estimate >= min(key % 20, 15) for key, estimate in enumerate(estimates))
    assert sum(estimate > min(key % 20, 15) for key, estimate in enumerate(estimates)) <= 2
    assert wtinylfu.estimate(state, EMPTY) == 0
    for _ in range(200_000):
        wtinylfu.count(state, 10**12)
    aged = [wtinylfu.estimate(state, key) for key in range(100)]
    assert all(new <= (old + 1) // 2 for new, old in zip(aged, estimates, strict=True))


def test_keyset_equals_a_dict():
    rng = np.random.default_rng(0)
    entries, expected = keyset.new_keyset(30), {}
    for key in rng.integers(0, 2**40, 60).tolist() + rng.integers(0, 60, 3000).tolist():
        if key in expected:
            keyset.remove(entries, expected.pop(key))
        elif len(expected) < 30:
            expected[key] = keyset.add(entries, key)
        assert all(keyset.find(entries, known) == entry for known, entry in expected.items())
        keyset.check(entries, list(expected.values()))
    assert keyset.find(entries, 2**41) == keyset.ABSENT


def test_the_default_is_a_policy_and_every_policy_goes_by_its_name():
    assert DEFAULT in POLICIES
    assert [policy.name for policy in POLICIES.values()] == list(POLICIES)


class AnyOrder(RuleBasedStateMachine):
    """Uses, pins and failed reads in any order: the books stay right, and a pinned slot keeps its key."""

    @initialize(
        name=st.sampled_from(sorted(POLICIES)),
        capacity=st.integers(1, 12),
        future=st.lists(st.integers(0, 30), max_size=40),
    )
    def start(self, name, capacity, future):
        options = {"static": {"hot_rows": future}, "belady": {"future": (future, range(len(future) + 1))}}.get(name, {})
        self.driver = Driver(name, capacity, **options)
        self.pinned = {}

    @rule(key=st.integers(0, 30))
    def use(self, key):
        hit, slot = self.driver.use(key)
        assert slot not in self.pinned or hit

    @rule(keys=st.lists(st.integers(0, 30), unique=True, max_size=20))
    def use_as_a_batch(self, keys):
        held = []
        for key in sorted(keys, key=lambda key: key not in self.driver.slot_of):
            _, slot = self.driver.use(key)
            if slot != BYPASS:
                self.driver.pins[slot] += 1
                held.append(slot)
        np.subtract.at(self.driver.pins, held, 1)

    @precondition(lambda self: self.driver.slot_of)
    @rule(data=st.data())
    def pin(self, data):
        key = data.draw(st.sampled_from(sorted(self.driver.slot_of)))
        slot = self.driver.slot_of[key]
        self.driver.pins[slot] += 1
        self.pinned[slot] = key

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data):
        slot = data.draw(st.sampled_from(sorted(self.pinned)))
        self.driver.pins[slot] = 0
        del self.pinned[slot]

    @precondition(lambda self: self.driver.slot_of)
    @rule(data=st.data())
    def fail(self, data):
        key = data.draw(st.sampled_from(sorted(self.driver.slot_of)))
        slot = self.driver.slot_of[key]
        self.driver.fail(slot)
        self.pinned = {pinned: EMPTY if pinned == slot else key for pinned, key in self.pinned.items()}

    @invariant()
    def books_are_right(self):
        if hasattr(self, "driver"):
            self.driver.check()
            assert all(self.driver.keys[slot] == key for slot, key in self.pinned.items())


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
