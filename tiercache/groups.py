"""Groups: rows that are always asked for together, `size` at a time, kept as one record of a tier.

The heads of an n-gram are such rows. To a level a group is one key, a hash of its row numbers: one probe, one answer of the
policy, one slot with the records side by side. Beside each slot are its row numbers, and every place that a plan gives a group
is compared with them. So a hash is only where the search begins: a group whose key another one has is a *stray*, which is read
to the staging area, and its bytes are as exact as any.

A place p of a group is the places `size * p + k` of its rows, in buffers seen as records; `~i`, of the staging area, is
`~(size * i + k)`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba.extending import overload

from tiercache.level import PLAN_HELD, PLAN_HITS, PLAN_MISSES, PLAN_STAGED, Level, Plan, pin
from tiercache.native import Settled, int64, lean, prefetch
from tiercache.stack import StackPlan

MAX_SIZE = 16
"""Rows of a group at most: a slot's count of pieces is an int8, and a record has two at most."""

_AHEAD = 12
"""Groups between asking for the row numbers of a slot and comparing them."""

_MASK = (1 << 64) - 1
_LAST = 0x9E3779B97F4A7C15 - (1 << 64)


def _weights() -> npt.NDArray[np.int64]:
    """Odd numbers without a pattern, one for each member: splitmix64 from 0."""
    weights = []
    for number in range(1, MAX_SIZE + 1):
        x = number * 0x9E3779B97F4A7C15 & _MASK
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
        weights.append((x ^ x >> 31) | 1)
    return np.array(weights, np.uint64).view(np.int64)


_WEIGHTS = _weights()


def hash_of(rows: Any, first: int, size: int) -> int:
    """63 bits of `size` row numbers from a position on, in their order: a weighted sum, then mixed."""
    x = sum(int(rows[first + k]) * int(_WEIGHTS[k]) for k in range(size)) & _MASK
    x = (x ^ x >> 32) * (_LAST & _MASK) & _MASK
    return (x ^ x >> 29) & _MASK >> 1


@overload(hash_of)
def _hash_twin(rows, first, size):  # type: ignore[no-untyped-def]
    def compiled(rows, first, size):  # type: ignore[no-untyped-def]
        x = np.int64(0)
        for k in range(size):
            x += rows[first + k] * _WEIGHTS[k]
        x = (x ^ (x >> 32 & 0xFFFFFFFF)) * _LAST
        return (x ^ (x >> 29 & 0x7FFFFFFFF)) & 0x7FFFFFFFFFFFFFFF

    return compiled


@lean
def _write_keys(rows: Any, size: int, keys: Any) -> None:
    for i in range(keys.size):
        keys[i] = hash_of(rows, i * size, size)


def keys_of(rows: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Key of each group: rows int64[n * size] to int64[n], none negative."""
    keys = np.empty(rows.size // size, np.int64)
    _write_keys(rows, size, keys)
    return keys


class Groups:
    """The row numbers in each slot of a store's tiers. Not safe from several threads: the store locks.

    upper, lower  int32 or int64[capacity, size], of the device tier (no slots without one) and of the host's: the rows of the
                  group whose key the slot has
    """

    def __init__(self, size: int, num_rows: int, lower: int, upper: int = 0) -> None:
        """For tables of `num_rows` rows in all, and tiers of so many slots."""
        self.size = size
        kind: type = np.int32 if num_rows <= 1 << 31 else np.int64
        self.upper: npt.NDArray[Any] = np.full((upper, size), -1, kind)
        self.lower: npt.NDArray[Any] = np.full((lower, size), -1, kind)
        self._agree, self._settle, self._note_risen = Settled(_agree), Settled(_settle), Settled(_note_risen)

    def room(self, rows: npt.NDArray[np.int64], *, above: bool) -> StackPlan:
        """Room for the plan of these rows, a group behind the other."""
        plan = StackPlan(rows.size // self.size, above=above)
        plan.rows = rows
        plan.keys = keys_of(rows, self.size)
        return plan

    def settle(self, plan: StackPlan, top: Level, *, served: bool) -> bool:
        """End the planning of a batch: note the rows of slots that it fills, and compare those of all others.

        `plan.below.misses` are then the positions of the groups to read, strays included. served: whether nothing was pinned,
        as every key was resident; whether that is so still is returned. Under the lock that the batch was planned under.
        """
        above = plan.above
        if served and above is None and self._agree(plan.where, plan.rows, self.lower):
            return True
        if above is not None:
            self._note_risen(above, self.lower, self.upper)
        strays = self._settle(plan.where, plan.below, plan.rows, self.upper, self.lower)
        if served and strays:
            _hold(top.slots, top.counters, plan.below if above is None else above)
            return False
        return served

    def missing(self, plan: StackPlan) -> npt.NDArray[np.int64]:
        """Rows to read of a plan that is settled, int64[m * size]."""
        return plan.rows.reshape(-1, self.size)[plan.below.misses].reshape(-1)

    def rows_in(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Rows in slots of the host tier, int64[m * size]."""
        return self.lower[slots].reshape(-1).astype(np.int64)

    def places(self, places: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Places of the rows of groups at places int32[m]: int32[m * size]."""
        spread = np.empty(places.size * self.size, np.int32)
        _spread(places, self.size, spread)
        return spread

    def check(self, level: Level, members: npt.NDArray[Any]) -> None:
        """Raise AssertionError where a slot's key is not that of its rows."""
        keys = level.slots["key"]
        resident = np.flatnonzero(keys >= 0)
        found = keys_of(members[resident].reshape(-1).astype(np.int64), self.size)
        assert np.array_equal(found, keys[resident]), "a slot has the rows of another group"


@lean
def _spread(places: Any, size: int, out: Any) -> None:
    for i in range(places.size):
        place = int64(places[i])
        step = 1 if place >= 0 else -1
        first = place * size if place >= 0 else ~(~place * size)
        for k in range(size):
            out[i * size + k] = first + step * k


@lean
def _note_risen(above: Plan, lower: Any, upper: Any) -> None:
    """Slots that a group rises to have the rows of those that it rises from."""
    hits = above.counts[PLAN_HITS]
    for i in range(above.counts[PLAN_MISSES]):
        slot, source = above.all_held[hits + i], above.all_fill[i]
        for k in range(lower.shape[1]):
            upper[slot, k] = lower[source, k]


@lean
def _agree(where: Any, rows: Any, members: Any) -> bool:
    """Whether every group is what its slot has: `_settle` for a batch that hit, of which it needs the places alone."""
    size = members.shape[1]
    bytes_a_slot, members_at = size * members.itemsize, members.ctypes.data
    other = int64(0)
    for i in range(where.size):
        if i + _AHEAD < where.size:
            prefetch(members_at + int64(where[i + _AHEAD]) * bytes_a_slot)
        slot = int64(where[i])
        for k in range(size):
            other |= members[slot, k] ^ rows[i * size + k]
    return other == 0


@lean
def _settle(where: Any, below: Plan, rows: Any, upper: Any, lower: Any) -> int:
    """See `Groups.settle`; how many strays there are.

    Misses are in first-seen order, so the first position with the place of the next miss is that miss. Staged ones are noted
    behind the held slots, where there is room for as many.
    """
    counts, num_upper, size = below.counts, upper.shape[0], lower.shape[1]
    misses, staged, held = counts[PLAN_MISSES], counts[PLAN_STAGED], counts[PLAN_HELD]
    bytes_a_slot = size * lower.itemsize
    upper_at, lower_at = upper.ctypes.data, lower.ctypes.data - num_upper * bytes_a_slot
    seen = strays = seen_staged = 0
    for i in range(where.size):
        if i + _AHEAD < where.size:
            ahead = int64(where[i + _AHEAD])
            prefetch((lower_at if ahead >= num_upper else upper_at) + ahead * bytes_a_slot)
        place = int64(where[i])
        if seen < misses and place == below.all_fill[seen] + (num_upper if below.all_fill[seen] >= 0 else 0):
            if place >= 0:
                for k in range(size):
                    lower[place - num_upper, k] = rows[i * size + k]
            else:
                below.all_held[held + seen_staged] = i
                seen_staged += 1
            below.all_misses[seen] = i
            seen += 1
            continue
        other = int64(0)
        if place >= num_upper:
            for k in range(size):
                other |= lower[place - num_upper, k] ^ rows[i * size + k]
        elif place >= 0:
            for k in range(size):
                other |= upper[place, k] ^ rows[i * size + k]
        else:
            first = below.all_held[held + ~place] * size
            for k in range(size):
                other |= rows[first + k] ^ rows[i * size + k]
        if other != 0:
            where[i] = ~(staged + strays)
            below.all_fill[misses + strays] = where[i]
            below.all_misses[misses + strays] = i
            strays += 1
    counts[PLAN_MISSES] += strays
    counts[PLAN_STAGED] += strays
    return strays


@lean
def _hold(slots: Any, counters: Any, plan: Plan) -> None:
    """Pin the hits of a plan that pinned nothing."""
    pin(slots, counters, plan.all_held[: plan.counts[PLAN_HITS]])
    plan.counts[PLAN_HELD] = plan.counts[PLAN_HITS]
