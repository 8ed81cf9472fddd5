"""What will be asked for: uses of rows that callers have announced, by row and by lane, in arrays.

A *lane* is what one caller announces: uses in the order in which they will come. Lanes come in turns with one another, and
with what nobody announced. So a use is due at a *turn*: the turns until then are the uses of its lane before it, and a turn
has passed when as many uses have come as lanes have some left. However many lanes come and go, what was noted stays right, as
in fair queueing. How many accesses of the tier a turn takes is measured. A row's uses lie in a list in order of turns, which
begins with the next one; a lane's lie in a list in the order in which they were announced.

A use is over when its row is asked for: the soonest of the row's, whichever lane announced it. It is given up when its lane is
cancelled, when it is overdue by more turns than its lane ever announced ahead, or when its lane has not met a use for longer
than that took, and than the tier has slots. What is announced where there is no room is not kept.

Times are accesses of the tier, as its policy counts them.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import inlined, int64, lean, prefetch
from tiercache.policies.keyset import mix

NONE = -1
NO_DUE = 0
"""Turn of the next use of a row that nobody announced."""
TURN = 1 << 20
"""A turn, of which the turns so far are counted in fractions."""

MAX_LANES = 4096
_ROOM = 1 << 21
"""Uses that are kept at most."""
_HOPS = 64
"""Uses of one row that are passed to find the place of another among them; beyond, the order is not exact."""
_MEMORY = 1 << 17
"""Rows asked for after which what was measured counts half."""

_ROW = np.dtype([("row", "i8"), ("chain", "i4"), ("first", "i4"), ("last", "i4"), ("unused", "i4")])
_USE = np.dtype(
    [("due", "i8"), ("entry", "i4"), ("before", "i4"), ("after", "i4"), ("lane", "i4"), ("next", "i4"), ("unused", "i4")]
)
_LANE = np.dtype([("first", "i4"), ("last", "i4"), ("left", "i8"), ("lead", "i8"), ("lag", "i8"), ("met", "i8")])

_FREE_USE, _USED, _FREE_ROW, _ROWS, _HAND = range(5)
LEFT, _LANES, _ASKED, _MET, _TIME, _AHEAD, _NOW, NOW_TURN = range(5, 13)


class Expected(NamedTuple):
    """Announced uses.

    heads  int32[n]  first entry of each bucket of rows + 1
    rows   ROW[n]    by entry: its row, the bucket's next entry, the row's first and last use; -1 for none
    uses   USE[n]    by use: when it is due, its row's entry or -1 if it is over, the uses before and after it of this row, its
                     lane, and the lane's next use
    lanes  LANE[m]   first and last use, uses that are not over, the most that one was announced ahead, in turns and in
                     accesses, and when it last met one
    book   int64[13] free uses, as a list through `next`; uses handed out so far; the same of entries; the lane to look at for
                     what is overdue; uses that are not over; lanes that have some; and, counting half after a while: rows
                     asked for, those of them that were announced, accesses meanwhile, uses ahead, summed over the rows asked
                     for; when that was last brought up to date; turns so far
    """

    heads: npt.NDArray[np.int32]
    rows: npt.NDArray[Any]
    uses: npt.NDArray[Any]
    lanes: npt.NDArray[Any]
    book: npt.NDArray[np.int64]


def new_expected(room: int = _ROOM) -> Expected:
    """Nothing announced. 60 bytes a use, of which the system gives memory as they are first used."""
    lanes = np.zeros(MAX_LANES, _LANE)
    lanes["first"] = lanes["last"] = NONE
    book = np.zeros(13, np.int64)
    book[NOW_TURN] = TURN
    book[[_FREE_USE, _FREE_ROW]] = NONE
    book[[_ASKED, _MET, _TIME]] = 256
    return Expected(np.zeros(room, np.int32), np.zeros(room, _ROW), np.zeros(room, _USE), lanes, book)


@lean
def ask_for(expected: Expected, row: int) -> None:
    """This row is looked for soon: ask for the memory that this will read first."""
    prefetch(expected.heads.ctypes.data + 4 * _bucket(expected, row))


@lean
def first_due(expected: Expected, row: int) -> int:
    """The turn at which a row is used next, or NO_DUE."""
    entry = _find(expected, row)
    if entry == NONE:
        return int64(NO_DUE)
    return int64(expected.uses["due"][expected.rows["first"][entry]])


@inlined
def pace(expected: Expected) -> float:
    """Accesses of the tier in a turn."""
    book = expected.book
    return max(book[_LANES], 1) * (float(book[_TIME]) / float(book[_MET]))


@lean
def announce(expected: Expected, lane: int, row: int, now: int) -> int:
    """Add a use behind a lane's others. When it is due, if it is its row's next one now; else NO_DUE."""
    uses, rows, lanes, book = expected.uses, expected.rows, expected.lanes, expected.book
    use = _new_use(expected)
    if use == NONE:
        return int64(NO_DUE)
    if lanes["left"][lane] == 0:
        book[_LANES] += 1
        lanes["met"][lane] = now
    lanes["left"][lane] += 1
    lead = lanes["left"][lane] * TURN
    due = book[NOW_TURN] + lead
    entry = _find(expected, row)
    if entry == NONE:
        entry = _new_row(expected, row)
    uses["due"][use] = due
    uses["entry"][use] = entry
    uses["lane"][use] = lane
    uses["next"][use] = NONE
    if lanes["last"][lane] == NONE:
        lanes["first"][lane] = use
    else:
        uses["next"][lanes["last"][lane]] = use
    lanes["last"][lane] = use
    if lead > lanes["lead"][lane]:
        lanes["lead"][lane] = lead
        lanes["lag"][lane] = max(lanes["lag"][lane], int64(lanes["left"][lane] * pace(expected)))
    book[LEFT] += 1
    _link(expected, entry, use, due)
    return due if rows["first"][entry] == use else int64(NO_DUE)


@lean
def meet(expected: Expected, row: int, now: int) -> int:
    """A row is asked for: its next use is over. When the one behind it is due, or NO_DUE; NONE if nobody announced this one."""
    entry = _find(expected, row)
    if entry == NONE:
        return int64(NONE)
    use, book = int64(expected.rows["first"][entry]), expected.book
    lane = int64(expected.uses["lane"][use])
    book[_MET] += 1
    book[NOW_TURN] += TURN // int64(book[_LANES])
    expected.lanes["met"][lane] = now
    due = _end(expected, use)
    _trim(expected, lane)
    return due


@lean
def count_asked(expected: Expected, num_rows: int, now: int) -> None:
    """So many rows were asked for until now: measure."""
    book = expected.book
    book[_ASKED] += num_rows
    book[_AHEAD] += num_rows * book[LEFT]
    book[_TIME] += max(now - book[_NOW], 0)
    book[_NOW] = now
    if book[_ASKED] >= _MEMORY:
        for word in range(_ASKED, _AHEAD + 1):
            book[word] = (book[word] + 1) >> 1


@lean
def begin_measuring(expected: Expected, now: int) -> None:
    """Something is announced after a time when nothing was, which does not count."""
    if expected.book[LEFT] == 0:
        expected.book[_NOW] = now


@lean
def horizon(expected: Expected) -> tuple[int, float]:
    """How far ahead uses are announced at most, in accesses, and which part of those up to there is, on average."""
    book, lanes = expected.book, expected.lanes
    longest = int64(0)
    for lane in range(lanes.size):
        if lanes["left"][lane] > 0:
            longest = max(longest, int64(lanes["lead"][lane]))
    if longest == 0:
        return int64(0), 0.0
    asked, met = float(book[_ASKED]), float(book[_MET])
    mean = float(book[_AHEAD]) / asked * float(book[_TIME]) / met
    accesses = max(int64(longest / TURN * pace(expected)), 1)
    return accesses, min(mean / accesses, 1.0) * min(met / asked, 1.0)


@lean
def give_up(expected: Expected, lane: int) -> int:
    """Give up a lane's first use. The row if that was its next use, else NO_ROW; DONE if the lane has none."""
    use = int64(expected.lanes["first"][lane])
    if use == NONE:
        return int64(DONE)
    entry = int64(expected.uses["entry"][use])
    row, was_first = int64(expected.rows["row"][entry]), expected.rows["first"][entry] == use
    _end(expected, use)
    _trim(expected, lane)
    return row if was_first else int64(NO_ROW)


NO_ROW, DONE = -1, -2


@lean
def next_overdue(expected: Expected, now: int, patience: int) -> int:
    """Look at one lane. Give up its first use if that is overdue; as `give_up`."""
    lanes, book = expected.lanes, expected.book
    lane = int64(book[_HAND])
    use = int64(lanes["first"][lane])
    if use != NONE:
        late = expected.uses["due"][use] < book[NOW_TURN] - lanes["lead"][lane]
        if late or now - lanes["met"][lane] > max(patience, int64(lanes["lag"][lane])):
            return give_up(expected, lane)
    book[_HAND] = (lane + 1) & (MAX_LANES - 1)
    return int64(DONE)


@lean
def _end(expected: Expected, use: int) -> int:
    """A use is over: take it out of its row's list. When the row's next use is due, or NO_DUE: then the row goes too."""
    uses, rows, lanes, book = expected.uses, expected.rows, expected.lanes, expected.book
    entry = int64(uses["entry"][use])
    before, after = int64(uses["before"][use]), int64(uses["after"][use])
    if before == NONE:
        rows["first"][entry] = after
    else:
        uses["after"][before] = after
    if after == NONE:
        rows["last"][entry] = before
    else:
        uses["before"][after] = before
    uses["entry"][use] = NONE
    lane = int64(uses["lane"][use])
    lanes["left"][lane] -= 1
    book[_LANES] -= lanes["left"][lane] == 0
    book[LEFT] -= 1
    first = int64(rows["first"][entry])
    if first == NONE:
        _drop_row(expected, entry)
        return int64(NO_DUE)
    return int64(uses["due"][first])


@lean
def _link(expected: Expected, entry: int, use: int, due: int) -> None:
    """Put a use where it belongs among its row's, which mostly is behind them."""
    uses, rows = expected.uses, expected.rows
    before, after = int64(rows["last"][entry]), int64(NONE)
    hops = _HOPS
    while before != NONE and uses["due"][before] > due and hops > 0:
        after = before
        before = int64(uses["before"][before])
        hops -= 1
    uses["before"][use] = before
    uses["after"][use] = after
    if before == NONE:
        rows["first"][entry] = use
    else:
        uses["after"][before] = use
    if after == NONE:
        rows["last"][entry] = use
    else:
        uses["before"][after] = use


@lean
def _trim(expected: Expected, lane: int) -> None:
    """Free the uses at the beginning of a lane that are over."""
    uses, lanes, book = expected.uses, expected.lanes, expected.book
    use = int64(lanes["first"][lane])
    while use != NONE and uses["entry"][use] == NONE:
        following = int64(uses["next"][use])
        uses["next"][use] = book[_FREE_USE]
        book[_FREE_USE] = use
        use = following
    lanes["first"][lane] = use
    if use == NONE:
        lanes["last"][lane] = NONE
        lanes["lead"][lane] = 0
        lanes["lag"][lane] = 0


@lean
def _new_use(expected: Expected) -> int:
    book = expected.book
    use = int64(book[_FREE_USE])
    if use != NONE:
        book[_FREE_USE] = expected.uses["next"][use]
    elif book[_USED] < expected.uses.size:
        use = int64(book[_USED])
        book[_USED] += 1
    return use


@lean
def _bucket(expected: Expected, row: int) -> int:
    return (mix(row) * expected.heads.size) >> 32


@lean
def _find(expected: Expected, row: int) -> int:
    """The entry of a row, or NONE."""
    entry = int64(expected.heads[_bucket(expected, row)]) - 1
    while entry != NONE and expected.rows["row"][entry] != row:
        entry = int64(expected.rows["chain"][entry])
    return entry


@lean
def _new_row(expected: Expected, row: int) -> int:
    """Add a row that is absent. There is always room: each entry has a use."""
    rows, book = expected.rows, expected.book
    entry = int64(book[_FREE_ROW])
    if entry != NONE:
        book[_FREE_ROW] = rows["chain"][entry]
    else:
        entry = int64(book[_ROWS])
        book[_ROWS] += 1
    bucket = _bucket(expected, row)
    rows["row"][entry] = row
    rows["chain"][entry] = expected.heads[bucket] - 1
    rows["first"][entry] = NONE
    rows["last"][entry] = NONE
    expected.heads[bucket] = entry + 1
    return entry


@lean
def _drop_row(expected: Expected, entry: int) -> None:
    rows, heads, book = expected.rows, expected.heads, expected.book
    bucket = _bucket(expected, int64(rows["row"][entry]))
    at = int64(heads[bucket]) - 1
    if at == entry:
        heads[bucket] = rows["chain"][entry] + 1
    else:
        while rows["chain"][at] != entry:
            at = int64(rows["chain"][at])
        rows["chain"][at] = rows["chain"][entry]
    rows["chain"][entry] = book[_FREE_ROW]
    book[_FREE_ROW] = entry


def check(expected: Expected) -> None:
    """Lists, table and counts say the same."""
    uses, rows, lanes, book = expected.uses, expected.rows, expected.lanes, expected.book
    entries: dict[int, int] = {}
    for bucket in np.flatnonzero(expected.heads).tolist():
        entry = int(expected.heads[bucket]) - 1
        while entry != NONE:
            row = int(rows[entry]["row"])
            assert row not in entries, f"row {row} has two entries"
            assert _bucket(expected, row) == bucket, f"row {row} is in another's bucket"
            entries[row] = entry
            entry = int(rows[entry]["chain"])
    alive = set()
    for row, entry in entries.items():
        use, before = int(rows[entry]["first"]), NONE
        assert use != NONE, f"row {row} has no use"
        while use != NONE:
            assert uses[use]["entry"] == entry, f"a use of row {row} says that it is another's, or over"
            assert uses[use]["before"] == before, f"the uses of row {row} are not linked both ways"
            alive.add(use)
            use, before = int(uses[use]["after"]), use
        assert rows[entry]["last"] == before, f"row {row} ends elsewhere"
    in_lanes, left = set(), 0
    for lane in np.flatnonzero(lanes["first"] != NONE).tolist():
        use, last, own = int(lanes[lane]["first"]), NONE, 0
        assert uses[use]["entry"] != NONE, "a lane begins with a use that is over"
        while use != NONE:
            assert uses[use]["lane"] == lane, "a use is in another's lane"
            own += bool(uses[use]["entry"] != NONE)
            in_lanes.add(use)
            use, last = int(uses[use]["next"]), use
        assert lanes[lane]["last"] == last, "a lane ends elsewhere"
        assert lanes[lane]["left"] == own, "a lane's uses are miscounted"
        left += own
    assert alive <= in_lanes, "a use is in no lane"
    assert left == len(alive) == book[LEFT], "uses are miscounted"
    assert np.count_nonzero(lanes["left"]) == book[_LANES], "lanes are miscounted"
    assert (lanes["last"][lanes["first"] == NONE] == NONE).all(), "an empty lane has an end"
    free, use = 0, int(book[_FREE_USE])
    while use != NONE:
        free, use = free + 1, int(uses[use]["next"])
    assert free + len(in_lanes) == book[_USED], "uses are lost"
