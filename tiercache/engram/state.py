"""NgramState: the last tokens of many sequences, kept between the steps in which their next tokens arrive.

Each sequence has a slot, as it has one in a cache of keys and values; which slot is the caller's affair. A slot is a
ring of tokens: the `context` that the next rows look back on, and `window` more, so that as many can be forgotten
again.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.engram.hasher import Hasher, Ids, check_counts, check_least, check_previous, to_ids
from tiercache.engram.window import ABSENT
from tiercache.native import lean


class NgramState:
    """Histories of up to `num_slots` sequences, for the hashers of all layers of a model. Not thread-safe.

    hashers: of all layers; they see the same tokens. window: tokens of each sequence that `rollback` can forget.
    Every slot begins empty. Calls raise before anything changes: ValueError for a slot that does not exist or is named twice.
    """

    def __init__(self, hashers: Iterable[Hasher], num_slots: int, *, window: int = 16) -> None:
        if not isinstance(hashers, Iterable):
            raise TypeError(f"hashers is a {type(hashers).__name__}: allowed is a sequence of hashers")
        self.hashers = tuple(hashers)
        if not self.hashers:
            raise ValueError("hashers = []: allowed is one and more")
        for hasher in self.hashers:
            if not isinstance(hasher, Hasher):
                raise TypeError(f"hashers: has a {type(hasher).__name__}; allowed are hashers")
        check_least(1, num_slots=num_slots)
        check_least(0, window=window)
        self.context = max(hasher.context for hasher in self.hashers)
        self.num_slots = num_slots
        self.window = window
        self._rings = np.full((num_slots, self.context + window), ABSENT, np.int64)
        self._ends = np.zeros(num_slots, np.int64)
        self._forgettable = np.zeros(num_slots, np.int64)
        self._seen = np.zeros(num_slots, np.int64)
        self._num_calls = 0

    def append(self, slots: npt.ArrayLike, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> list[Ids]:
        """Take in the next tokens of some sequences; their rows, one int64[T, num_heads] a hasher.

        slots: integers [n], distinct. tokens: integers [T], those of the first slot, then of the second, and so on.
        lengths: integers [n], tokens of each slot, which sum to T; None where each slot has as many, as in a decode step.
        Raises ValueError also for an id outside the vocabulary.
        """
        chosen, ids = to_ids("slots", slots, 1), to_ids("tokens", tokens, 1)
        counts = self._lengths(chosen.size, ids.size, lengths)
        previous = self._look_back(chosen)
        rows = []
        for hasher in self.hashers:
            out = np.empty((ids.size, hasher.num_heads), np.int64)
            hasher.runs(ids, counts, previous, out)
            rows.append(out)
        _append(chosen, ids, counts, self._rings, self._ends, self._forgettable, self.window)
        return rows

    def previous(self, slots: npt.ArrayLike) -> Ids:
        """The last tokens of some sequences, int64[n, context], oldest first, ABSENT before the start. Changes nothing.

        This is what `Hasher.batch` and `Hasher.torch_rows` take, where all hashers have the same context.
        """
        return self._look_back(to_ids("slots", slots, 1))

    def rollback(self, slots: npt.ArrayLike, counts: npt.ArrayLike) -> None:
        """Forget the last tokens of some sequences, as when drafts are rejected.

        slots: integers [n], distinct. counts: integers [n]. A slot can forget what was appended since its reset, at most
        `window` tokens behind the longest that it was. Raises ValueError for more.
        """
        chosen, numbers = self._pairs(slots, "counts", counts)
        self._check_slots(chosen)
        wrong = np.flatnonzero((numbers < 0) | (numbers > self._forgettable[chosen]))
        if wrong.size:
            slot, number = chosen[wrong[0]], numbers[wrong[0]]
            raise ValueError(f"counts: {number} tokens of slot {slot}: allowed is 0..{self._forgettable[slot]}")
        _rollback(chosen, numbers, self._ends, self._forgettable, self._rings.shape[1])

    def fork(self, sources: npt.ArrayLike, targets: npt.ArrayLike) -> None:
        """Make the sequences in `targets` copies of those in `sources`, as they were before the call.

        sources: integers [n]. targets: integers [n], distinct.
        """
        origin, chosen = self._pairs(sources, "targets", targets)
        for slot in origin[(origin < 0) | (origin >= self.num_slots)][:1]:
            raise ValueError(f"sources: slot {slot}: allowed is 0..{self.num_slots - 1}")
        self._check_slots(chosen)
        for array in (self._rings, self._ends, self._forgettable):
            array[chosen] = array[origin]

    def reset(self, slots: npt.ArrayLike, previous: npt.ArrayLike | None = None) -> None:
        """Begin sequences anew. There is no call to free a slot: whoever takes it next resets it.

        slots: integers [n], distinct. previous: integers [n, context], the tokens that came before, oldest first and ABSENT
        before the start, where a sequence begins with tokens that are not appended, such as a prefix whose keys and values are
        cached; they cannot be forgotten.
        """
        chosen = to_ids("slots", slots, 1)
        self._check_slots(chosen)
        before = np.full((chosen.size, self.context), ABSENT, np.int64)
        if previous is not None:
            before = to_ids("previous", previous, 2)
            check_previous(before.shape, chosen.size, self.context)
        nothing = np.empty(0, np.int64)
        for hasher in self.hashers:
            # Checks the ids.
            hasher.runs(nothing, np.zeros(chosen.size, np.int64), before, nothing.reshape(0, hasher.num_heads))
        self._rings[chosen, : self.context] = before
        self._ends[chosen] = self.context % self._rings.shape[1]
        self._forgettable[chosen] = 0

    def _look_back(self, slots: Ids) -> Ids:
        self._check_slots(slots)
        out = np.empty((slots.size, self.context), np.int64)
        _look_back(slots, self._rings, self._ends, out)
        return out

    def _check_slots(self, slots: Ids) -> None:
        self._num_calls += 1
        bad = _find_bad(slots, self._seen, self._num_calls)
        if bad >= 0:
            twice = 0 <= slots[bad] < self.num_slots
            raise ValueError(f"slots: {slots[bad]} {'stands twice' if twice else f'is outside 0..{self.num_slots - 1}'}")

    @staticmethod
    def _lengths(num_slots: int, num_tokens: int, lengths: npt.ArrayLike | None) -> Ids:
        if lengths is None:
            each, rest = divmod(num_tokens, num_slots) if num_slots else (0, num_tokens)
            if rest:
                raise ValueError(f"tokens: {num_tokens} for {num_slots} slots are not as many for each: lengths is needed")
            return np.full(num_slots, each, np.int64)
        counts = to_ids("lengths", lengths, 1)
        if counts.size != num_slots:
            raise ValueError(f"lengths: {counts.size} for {num_slots} slots")
        check_counts("lengths", counts, num_tokens)
        return counts

    @staticmethod
    def _pairs(first: npt.ArrayLike, name: str, second: npt.ArrayLike) -> tuple[Ids, Ids]:
        slots, others = to_ids("slots", first, 1), to_ids(name, second, 1)
        if slots.size != others.size:
            raise ValueError(f"{name}: {others.size} for {slots.size} slots")
        return slots, others

    def check(self) -> None:
        """Raise AssertionError where the books do not agree with themselves."""
        assert ((self._forgettable >= 0) & (self._forgettable <= self.window)).all()
        assert ((self._ends >= 0) & (self._ends < self._rings.shape[1])).all()
        assert (self._seen <= self._num_calls).all()


@lean
def _find_bad(slots: Any, seen: Any, call: int) -> int:
    """Position of the first slot that does not exist or stands there for the second time, or -1."""
    for at in range(slots.size):
        slot = slots[at]
        if slot < 0 or slot >= seen.size or seen[slot] == call:
            return at
        seen[slot] = call
    return -1


@lean
def _look_back(slots: Any, rings: Any, ends: Any, out: Any) -> None:
    """Copy the last tokens of each slot, oldest first. out: int64[n, context]."""
    context, room = out.shape[1], rings.shape[1]
    for at in range(slots.size):
        slot = slots[at]
        place = ends[slot] - context
        if place < 0:
            place += room
        for back in range(context):
            out[at, back] = rings[slot, place]
            place += 1
            if place == room:
                place = 0


@lean
def _append(slots: Any, tokens: Any, lengths: Any, rings: Any, ends: Any, forgettable: Any, window: int) -> None:
    """Write the tokens of each slot behind its last; of a run longer than the ring only what stays in it."""
    room, end = rings.shape[1], 0
    for at in range(slots.size):
        slot = slots[at]
        begin, end = end, end + lengths[at]
        place = ends[slot]
        for token in range(max(begin, end - room), end):
            rings[slot, place] = tokens[token]
            place += 1
            if place == room:
                place = 0
        ends[slot] = place
        forgettable[slot] = min(window, forgettable[slot] + lengths[at])


@lean
def _rollback(slots: Any, counts: Any, ends: Any, forgettable: Any, room: int) -> None:
    for at in range(slots.size):
        ends[slots[at]] = (ends[slots[at]] - counts[at]) % room
        forgettable[slots[at]] -= counts[at]
