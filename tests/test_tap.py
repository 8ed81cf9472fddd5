"""Taps: what is read is what was put, whatever comes between; what there was no room for is counted where it was left out."""

import os
import select
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiercache import tap
from tiercache.tap import LOST, LOST_BATCHES, LOST_ROWS, MOST_BATCHES, MOST_ROWS, TAKEN_BATCHES, TAKEN_ROWS, WORTH_ROWS, Tap

SIZES = (1, 3, WORTH_ROWS, MOST_ROWS // 4, MOST_ROWS // 2, MOST_ROWS - 3, MOST_ROWS, MOST_ROWS + 1)
ROWS = np.arange(MOST_ROWS + 1001)


@pytest.fixture
def taps():
    """Makes taps, and closes them at the end."""
    made = []

    def new(num_rows=1000):
        made.append(Tap(num_rows))
        return made[-1]

    yield new
    for each in made:
        os.close(each.wake)


def is_woken(each):
    poll = select.poll()
    poll.register(each.wake, select.POLLIN)
    woken = bool(poll.poll(0))
    if woken:
        os.eventfd_read(each.wake)
    return woken


class Reader:
    """The thread's side of a tap, step by step."""

    def __init__(self, each):
        self.tap, self.looked = each, deque()
        self.lost = [0, 0]

    def read(self):
        """The next batch's (first row of its table, its rows), or None; what was left out is counted."""
        if not self.looked:
            self.looked.extend(self.tap.look().entries.tolist())
        if not self.looked:
            return None
        first, size, at, batches = self.looked.popleft()
        rows = self.tap.rows[at : at + size].copy()
        self.tap.done(1)
        if first == LOST:
            self.lost[0] += batches
            self.lost[1] += size
            return self.read()
        assert batches == 1
        return first, rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SIZES) | st.just(0), max_size=60), st.sampled_from((1 << 31, (1 << 31) + 1)))
def test_what_is_read_is_what_was_put(steps, num_rows):
    """Steps: sizes of batches, and 0 for reading one."""
    each = Tap(num_rows)
    assert each.rows.dtype == (np.int32 if num_rows == 1 << 31 else np.int64)
    reader, expected, lost = Reader(each), deque(), [0, 0]
    for number, size in enumerate([*steps, *[0] * (len(steps) + 1)]):
        if size == 0:
            found = reader.read()
            assert (found is None) == (not expected)
            if found is not None:
                first, rows = found
                assert first == rows[0]
                assert np.array_equal(rows, expected.popleft())
            continue
        batch = ROWS[number : number + size]
        before = int(each.counts[TAKEN_BATCHES])
        tap.fill(each.address, batch)
        if each.counts[TAKEN_BATCHES] > before:
            expected.append(batch)
        else:
            assert size > MOST_ROWS or expected, "nothing waits, and there is no room"
            lost[0] += 1
            lost[1] += size
        assert sum(batch.size for batch in expected) <= MOST_ROWS
    assert not expected
    assert [sum(pair) for pair in zip(reader.lost, each.untold(), strict=True)] == lost
    assert each.counts[[LOST_BATCHES, LOST_ROWS]].tolist() == lost
    os.close(each.wake)


def test_rows_that_are_read_at_once_go_round_at_the_start_of_the_ring(taps):
    each = taps()
    reader = Reader(each)
    for _ in range(100):
        tap.fill(each.address, ROWS[:WORTH_ROWS])
        tap.fill(each.address, ROWS[5 : WORTH_ROWS + 5])
        places = each.look().at if not reader.looked else np.zeros(0)
        assert (places <= 4 * WORTH_ROWS).all()
        assert reader.read()[1][0] == 0
        assert reader.read()[1][0] == 5
    assert each.counts[[TAKEN_BATCHES, LOST_BATCHES]].tolist() == [200, 0]


@pytest.mark.parametrize("turns", range(2, 8))
def test_all_of_the_ring_has_room_wherever_it_was_left(taps, turns):
    each = taps()
    reader = Reader(each)
    tap.fill(each.address, ROWS[:WORTH_ROWS])
    for _ in range(turns):
        tap.fill(each.address, ROWS[:WORTH_ROWS])
        reader.read()
    count = 0
    while each.counts[LOST_BATCHES] == 0:
        tap.fill(each.address, ROWS[count : count + WORTH_ROWS])
        count += 1
    assert (count + 2) * WORTH_ROWS >= MOST_ROWS
    assert reader.read()[1][0] == 0
    assert [reader.read()[1][0] for _ in range(count - 1)] == list(range(count - 1))
    assert reader.read() is None


def test_the_thread_is_woken_when_there_is_enough_and_when_something_is_left_out(taps):
    each = taps()
    reader = Reader(each)
    tap.fill(each.address, ROWS[: WORTH_ROWS - 1])
    assert not is_woken(each)
    tap.fill(each.address, ROWS[:1])
    assert is_woken(each)
    tap.fill(each.address, ROWS[:1])
    assert not is_woken(each)
    while reader.read() is not None:
        pass
    tap.fill(each.address, ROWS[: WORTH_ROWS - 1])
    assert not is_woken(each), "what was looked at counts no more"
    tap.fill(each.address, ROWS[: MOST_ROWS + 1])
    assert is_woken(each)


def test_a_list_that_is_half_full_wakes_the_thread_and_a_full_one_leaves_out(taps):
    each = taps()
    for number in range(MOST_BATCHES + 5):
        each.add(0, ROWS[:0])
        assert is_woken(each) == (number + 1 == MOST_BATCHES // 2 or number >= MOST_BATCHES - 1)
    assert each.counts[[TAKEN_BATCHES, LOST_BATCHES]].tolist() == [MOST_BATCHES - 1, 6]
    assert each.untold() == (6, 0)
    each.done(10)
    each.add(7, ROWS[:2])
    assert each.look().entries[-2:, [0, 1, 3]].tolist() == [[LOST, 0, 6], [7, 2, 1]]
    assert each.counts[TAKEN_ROWS] == 2


def test_one_call_fills_a_chain_of_taps(taps):
    first, second = taps(), taps(1 << 40)
    address = tap.chain([first, second])
    tap.fill(address, ROWS[3:9])
    tap.fill(address, ROWS[:0])
    tap.fill(tap.chain([second]), ROWS[4:5])
    tap.fill(tap.chain([]), ROWS[4:5])
    assert Reader(first).read()[1].tolist() == [3, 4, 5, 6, 7, 8]
    reader = Reader(second)
    assert [reader.read()[1].tolist() for _ in range(2)] == [[3, 4, 5, 6, 7, 8], [4]]
    assert first.counts[TAKEN_BATCHES] == 1
