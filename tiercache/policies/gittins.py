"""Gittins: evict the row whose slot will earn the fewest hits for the time it takes, as measured on this very trace.

Rows are told apart by two things: how often they were used, up to 15, and how long before the last use the one before it was:
less than a tier's worth of accesses, more, or not since the row came. Rows that the tier began with are told apart by their
rank until they are used. That makes a *class*. The policy measures for each class how the next use comes: after what time, or
never. From that follows an index for each class and each age since the last use,

    index(class, age) = max over T of  P(used again within T) / E[time until used again, or T],

the most hits per unit of time that keeping such a row can still bring, whenever one gives it up. To evict, the slots of two
random neighbourhoods of 32 are looked at, and the lowest index leaves. There is no list, no queue and no parameter to choose:
whether recency or frequency counts, and how much, is measured, and follows the trace.

What is measured must not depend on what is evicted, or a class that is thrown away early would never be seen to return. So it
is measured on a sample of rows (by hash, resident or not), each remembered until its place is taken. Of each class and age are
counted the rows that reached it, and those that were used in it; so what is too young to have returned does not count as lost,
and a tier that begins empty learns right from the start. What few rows of a class have reached is taken to go on as it went
before: where uses follow a power law, as many return in one quarter octave as in the next.

How often a row was used must outlive its eviction: most uses that matter lie before it entered. So eight fingerprints of 12
bits a slot remember the uses of rows that left; in a full line of 32 the least used of four leaves and the others age.

A hit writes two bytes, which 32 slots share a cache line for. Time runs in accesses, ages in quarter octaves of a 64th of the
tier's slots; a slot remembers ages up to eight times the tier's slots, a hand that goes round keeps what is older at that.

A batch pins its hits and what it brought. So where it fills the tier, all that is left to evict is what was learned before.
Where the lowest of those looked at is pinned, another neighbourhood is looked at, and its lowest without a pin leaves only if
its index is not above that of the newcomer's class at age 0. Else the answer is BYPASS, as it is after `MAX_PINNED_VICTIMS`;
the key that is kept out is remembered with its uses. Without pins every newcomer enters.

Gittins, "Bandit Processes and Dynamic Allocation Indices", J. R. Statist. Soc. B 41(2), 1979; for caches, Beckmann, Chen,
Cidon, "LHD: Improving Cache Hit Rate by Maximizing Hit Density", NSDI 2018, which measures what the cache itself sees.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba.extending import overload

from tiercache.native import inlined, int64, lean, prefetch
from tiercache.policies.base import BYPASS, EMPTY, MAX_PINNED_VICTIMS, Policy, bind
from tiercache.policies.keyset import mix

_MOST_USES = 15
_INTERVALS = 4
_SHORT, _LONG, _GIVEN, _NONE = range(4)
"""The interval before the last use: shorter than the tier's slots, in accesses, or longer; or none, as the tier began with the
row, or as it has just come. A finer division makes classes that are learned more slowly than it tells."""
_RANKS = _MOST_USES
"""A rank takes the place of the uses."""
_TIER = 20
"""Column of an age of as many accesses as the tier has slots."""
_CLASSES = (_MOST_USES + 1) * _INTERVALS
_COLUMNS = 64
"""Columns of a table by age; those in use are fewer."""
_LAST_AGE = (1 << 13) - 1
_NUM_AGES = 48
_TURN = 1024
_OLDEST = 512
"""Units of time in which a slot's clock goes round, and the age at which it is kept."""
_PATROL = 128
"""Accesses between two steps of the hand, which looks at half as many slots: so none is ever older than a turn."""
_LINE = 32
_LINES = 2
_GHOSTS = 32
"""Fingerprints in a line."""
_ONE = 256
"""What one event counts, so that it can fade."""
_FADE = 3
_ENOUGH = 16
_DOUBT = 32
"""Rows that would have to reach an age to count as much as the guess that it brings what the age before it brings."""
_CYCLE = 1 << 16
"""Accesses in which every class is judged once, in tiers of up to twice as many slots."""
_SAMPLES = 1 << 18
_UNITS = 64
"""Units of time in as many accesses as the tier has slots, about."""
_MEMORY = 8
"""Tiers' worth of accesses that the samples remember; up to four times as many where a sample of an eighth has room."""
_EPOCH = 1 << 39
"""Times of samples are modulo this, which is longer than anything is remembered."""
_SCALE = float(1 << 30)
_NEVER = 1 << 62
_USED, _CLOCK, _DRAWS, _SHIFT, _SAMPLE_MASK, _GROUP, _LESSON, _INTERVAL, _HAND, _LEFT, _LEFT_USES, _LEFT_AT = range(12)


class State(NamedTuple):
    """Words by slot, what is remembered of rows that left, and what was measured.

    words    uint16[capacity]       time of the last use in units << 6 | class, which is uses << 2 | interval, or rank << 2 | 2
    ghosts   uint16[lines, 32]      fingerprint << 4 | uses, of rows that left; 0 for none
    samples  int64[n]               time of the last use modulo 2**39 << 24 | fingerprint << 8 | class, of sampled rows by hash;
                                    0 for none
    seen     int64[classes]         time when each part of the samples was last looked through
    returns  int64[classes, 64]     uses of sampled rows by class and age, faded
    reached  int64[classes, 65]     differences of: sampled rows that reached an age, faded
    worth    int32[classes, 64]     index: hits per unit of time, scaled
    age_of   uint8[8192]            column of an age
    book     int64[12]              slots handed out; accesses; neighbourhoods drawn; log2 of the unit of time; a sampled row's
                                    hash has no bit of this mask; class to learn next, when, accesses in between; the hand;
                                    the row that left last or EMPTY, its uses, and when: it is remembered at the next miss,
                                    when its line of ghosts has come
    uses     float64[64]            of a lesson: uses of a run of ages, its time, and the age behind it
    time     float64[64]
    end      int64[64]
    """

    words: npt.NDArray[np.uint16]
    ghosts: npt.NDArray[np.uint16]
    samples: npt.NDArray[np.int64]
    seen: npt.NDArray[np.int64]
    returns: npt.NDArray[np.int64]
    reached: npt.NDArray[np.int64]
    worth: npt.NDArray[np.int32]
    age_of: npt.NDArray[np.uint8]
    book: npt.NDArray[np.int64]
    uses: npt.NDArray[np.float64]
    time: npt.NDArray[np.float64]
    end: npt.NDArray[np.int64]


def init(capacity: int) -> State:
    """State of `capacity` slots: 18 bytes a slot, and 2.2 MiB at most."""
    shift = max(capacity // _UNITS, 1).bit_length() - 1
    rarity = max(_rarity(_MEMORY * capacity), min(_rarity(4 * _MEMORY * capacity), 3))
    interval = max(max(capacity // 2, min(8 * capacity, _CYCLE)) // _CLASSES, _PATROL)
    lines = max(1, capacity * 8 // _GHOSTS)
    return State(
        _aligned(capacity),
        _aligned(lines * _GHOSTS).reshape(lines, _GHOSTS),
        np.zeros(min(4 * _MEMORY * capacity, _SAMPLES), np.int64),
        np.zeros(_CLASSES, np.int64),
        np.zeros((_CLASSES, _COLUMNS), np.int64),
        np.zeros((_CLASSES, _COLUMNS + 1), np.int64),
        _first_guess(),
        np.array([_column(age) for age in range(_LAST_AGE + 1)], np.uint8),
        np.array([0, 0, 0, shift, (1 << rarity) - 1, 0, 0, interval, 0, EMPTY, 0, 0], np.int64),
        np.zeros(_COLUMNS),
        np.zeros(_COLUMNS),
        np.zeros(_COLUMNS, np.int64),
    )


def _rarity(num_rows: int) -> int:
    """How often to halve a number of rows, to have room for a sample."""
    return max(-(-num_rows // _SAMPLES) - 1, 0).bit_length()


def _aligned(size: int) -> npt.NDArray[np.uint16]:
    """Zeros that begin on a cache line."""
    memory = np.zeros(2 * size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + 2 * size].view(np.uint16)


def _column(age: int) -> int:
    """Quarter octaves: 0 to 7 for themselves, then four columns for each doubling."""
    octave = max(age.bit_length() - 3, 0)
    return 4 * octave + (age >> octave)


def _first_guess() -> npt.NDArray[np.int32]:
    """Before anything was measured: uses by age. What the tier began with has been chosen, and stays."""
    ages = np.arange(_COLUMNS, dtype=np.int64)
    uses = np.arange(_CLASSES, dtype=np.int64)[:, None] // _INTERVALS
    guess = ((uses << 24) // (1 + ages)).astype(np.int32)
    guess[_GIVEN::_INTERVALS] = _MOST_USES << 24
    return guess


def rank(state: State, keys: Any, slots: npt.NDArray[np.int32]) -> None:
    """Rows are classes by their rank, from the hottest 225th of them to the last eighth, each worth what it turns out to be.
    That they were admitted was no use of theirs: time, and what is measured, begins now.
    """
    for array in (state.samples, state.returns, state.reached, state.seen):
        array[:] = 0
    state.worth[:] = _first_guess()
    state.book[[_CLOCK, _GROUP, _LESSON]] = 0
    place = np.arange(slots.size) / max(slots.size, 1)
    ranks = np.maximum(_RANKS - np.floor(_RANKS * np.sqrt(place)), 1).astype(np.int64)
    _begin_with(state, keys, slots, ranks)


@lean
def _begin_with(state: State, keys: Any, slots: Any, ranks: Any) -> None:
    """These slots' rows are of these classes now."""
    for i in range(slots.size - 1, -1, -1):
        slot, group = slots[i], (ranks[i] << 2) | _GIVEN
        state.words[slot] = group
        bits = mix(keys[slot] + 1)
        if bits & state.book[_SAMPLE_MASK] == 0:
            _observe(state, keys[slot], bits, int64(0), group)


@inlined
def on_hit(state: State, keys: Any, slot: int) -> None:
    """Note the use in the slot's word."""
    now = _tick(state)
    word = int64(state.words[slot])
    time = now >> state.book[_SHIFT]
    column = int64(state.age_of[(time - (word >> 6)) & (_TURN - 1)])
    uses = _uses(word)
    uses += uses < _MOST_USES
    group = (uses << 2) | (_LONG if column >= _TIER else _SHORT)
    state.words[slot] = ((time & (_TURN - 1)) << 6) | group
    bits = mix(keys[slot] + 1)
    if bits & state.book[_SAMPLE_MASK] == 0:
        _observe(state, keys[slot], bits, now, group)


@inlined
def ask(state: State, slot: int) -> None:
    """The slot's word."""
    prefetch(state.words.ctypes.data + 2 * slot)


@inlined
def ask_miss(state: State, key: int) -> None:
    """The key's line of ghosts, and its place among the samples."""
    prefetch(_ghosts_at(state, key))
    if mix(key + 1) & state.book[_SAMPLE_MASK] == 0:
        prefetch(state.samples.ctypes.data + 8 * ((mix(key) * state.samples.size) >> 32))


@inlined
def on_miss(state: State, keys: Any, pins: Any, key: int) -> int:
    """The slot of the lowest index among those looked at."""
    if state.book[_LEFT] != EMPTY:
        _remember(state, state.book[_LEFT], state.book[_LEFT_USES], state.book[_LEFT_AT])
        state.book[_LEFT] = EMPTY
    now = _tick(state)
    bits = mix(key + 1)
    uses = min(_recall(state, key, bits) + 1, _MOST_USES)
    group = (uses << 2) | _NONE
    if bits & state.book[_SAMPLE_MASK] == 0:
        _observe(state, key, bits, now, group)
    slot = int64(state.book[_USED])
    if slot < keys.size:
        state.book[_USED] += 1
    else:
        slot = _victim(state, pins, now, least_of(state, key, group, now), int64(state.worth[group, 0]))
        if slot < 0:
            _remember(state, key, uses, now)
            return int64(BYPASS)
        if keys[slot] != EMPTY:
            prefetch(_ghosts_at(state, keys[slot]))
            state.book[_LEFT], state.book[_LEFT_USES] = keys[slot], _uses(int64(state.words[slot]))
            state.book[_LEFT_AT] = now
    state.words[slot] = (((now >> state.book[_SHIFT]) & (_TURN - 1)) << 6) | group
    return slot


@inlined
def _uses(word: int) -> int:
    """How often a slot's row was used: once at least, which is all that is known of one that the tier began with."""
    return int64(1) if word & 3 == _GIVEN else (word >> 2) & 15


@inlined
def _tick(state: State) -> int:
    """Count an access; move the hand on, now and then. The time."""
    book = state.book
    now = int64(book[_CLOCK]) + 1
    book[_CLOCK] = now
    if now & (_PATROL - 1) == 0:
        _patrol(state, now)
    return now


@lean
def _patrol(state: State, now: int) -> None:
    """Keep the slots under the hand from seeming young again when their clock has gone round; learn, now and then."""
    words, book = state.words, state.book
    if now >= book[_LESSON]:
        book[_LESSON] = now + min(book[_INTERVAL], now >> 8)  # often at first
        learn(state, int64(book[_GROUP]), now)
        book[_GROUP] = (book[_GROUP] + 1) & (_CLASSES - 1)
    time = now >> book[_SHIFT]
    for _ in range(min(_PATROL // 2, words.size)):
        slot = book[_HAND]
        word = int64(words[slot])
        if (time - (word >> 6)) & (_TURN - 1) > _OLDEST:
            words[slot] = (((time - _OLDEST) & (_TURN - 1)) << 6) | (word & 63)
        book[_HAND] = slot + 1 if slot + 1 < words.size else 0


@inlined
def _victim(state: State, pins: Any, now: int, least: int, newcomer: int) -> int:
    """The slot to give up for a row of this index. BYPASS where none is worth less than `least`, where the lowest is pinned and
    the others are worth more than the newcomer, or where too many are pinned."""
    _, slot, _ = _look(state, pins, now, _LINES, False, least)
    if slot < 0 or pins[slot] <= 0:
        return slot
    if least == _NEVER:
        least = newcomer + 1
    patience = MAX_PINNED_VICTIMS
    while patience > 0:
        met, slot, lowest = _look(state, pins, now, 1, True, int64(_NEVER))
        if slot >= 0:
            return slot if lowest < least else int64(BYPASS)
        patience -= met
    return int64(BYPASS)


@inlined
def _look(state: State, pins: Any, now: int, lines: int, careful: bool, least: int) -> tuple[int, int, int]:
    """Draw neighbourhoods: (pinned slots met, slot of the lowest index below `least` or -1, its index). Looks at pins only if
    careful."""
    words = state.words
    capacity = words.size
    num_lines = (capacity + _LINE - 1) // _LINE
    draw = int64(state.book[_DRAWS])
    state.book[_DRAWS] = draw + lines
    for ahead in range(draw + lines, draw + 2 * lines):
        prefetch(words.ctypes.data + 2 * _LINE * ((mix(ahead) * num_lines) >> 32))
    lowest, best, met = int64(least), int64(-1), int64(0)
    for number in range(draw, draw + lines):
        begin = ((mix(number) * num_lines) >> 32) * _LINE
        for slot in range(begin, min(begin + _LINE, capacity)):
            if careful and pins[slot] > 0:
                met += 1
                continue
            value = int64(worth_of(state, slot, now))
            if value < lowest:
                lowest, best = value, int64(slot)
    return met, best, lowest


@inlined
def _ghosts_at(state: State, key: int) -> int:
    """Address of a key's line of ghosts."""
    return state.ghosts.ctypes.data + 2 * _GHOSTS * _line_of(state, key)


@inlined
def _line_of(state: State, key: int) -> int:
    """The line of ghosts of a key."""
    return (mix(key) * state.ghosts.shape[0]) >> 32


def worth_of(state: Any, slot: int, now: int) -> int:
    """What keeping a slot's row is worth: its index, unless the state's type knows better."""
    return int(type(state).worth_of(state, slot, now))


def least_of(state: Any, key: int, group: int, now: int) -> int:
    """What a slot has to be worth less than, to be given up for a key that is of this class now."""
    return int(type(state).least_of(state, key, group, now))


@overload(worth_of, jit_options={"forceinline": True})
def _worth_of(state, slot, now):  # type: ignore[no-untyped-def]
    function = state.instance_class.worth_of
    return lambda state, slot, now: function(state, slot, now)


@overload(least_of)
def _least_of(state, key, group, now):  # type: ignore[no-untyped-def]
    function = state.instance_class.least_of
    return lambda state, key, group, now: function(state, key, group, now)


@inlined
def _index(state: State, slot: int, now: int) -> int:
    """The index of the slot's class at its age."""
    word = int64(state.words[slot])
    age = ((now >> state.book[_SHIFT]) - (word >> 6)) & (_TURN - 1)
    return int64(state.worth[word & 63, state.age_of[age]])


@inlined
def _anything(state: State, key: int, group: int, now: int) -> int:
    """Whoever comes is let in."""
    return int64(_NEVER)


@inlined
def _recall(state: State, key: int, bits: int) -> int:
    """Uses of a row before it left, or 0; they are forgotten here, as the row is back."""
    line = _line_of(state, key)
    mark = (bits >> 8) & 0xFFF
    found = int64(0)
    for place in range(_GHOSTS):  # no way out, so that it takes few instructions
        ghost = int64(state.ghosts[line, place])
        found |= int64((ghost >> 4 == mark) & (ghost != 0)) << place
    if found == 0:
        return int64(0)
    place = int64(0)
    while (found >> place) & 1 == 0:
        place += 1
    uses = int64(state.ghosts[line, place]) & 15
    state.ghosts[line, place] = 0
    return uses


@inlined
def _remember(state: State, key: int, uses: int, now: int) -> None:
    """Remember a row that left, in place of the least used of four. If they all were used again, they age."""
    line = _line_of(state, key)
    bits = mix(key + 1)
    start = now & (_GHOSTS - 4)
    fewest, place = int64(_MOST_USES + 1), int64(0)
    for candidate in range(start, start + 4):
        found = int64(state.ghosts[line, candidate]) & 15
        if found < fewest:
            fewest, place = found, int64(candidate)
    if fewest > 1:
        for candidate in range(start, start + 4):
            state.ghosts[line, candidate] -= np.uint16(1)
    state.ghosts[line, place] = ((bits >> 8) & 0xFFF) << 4 | uses


@inlined
def _observe(state: State, key: int, bits: int, now: int, group: int) -> None:
    """A sampled row was used and is of this class now: how long after its use before?"""
    place = (mix(key) * state.samples.size) >> 32
    mark = (bits >> 16) & 0xFFFF
    sample = state.samples[place]
    if sample != 0:
        part = place * _CLASSES // state.samples.size
        age = _follow(state, sample, state.seen[part], now)
        if (sample >> 8) & 0xFFFF == mark:
            state.returns[sample & 63, age] += _ONE
    state.samples[place] = ((now & (_EPOCH - 1)) << 24) | (mark << 8) | group
    state.reached[group, 0] += _ONE
    state.reached[group, 1] -= _ONE


@lean
def _follow(state: State, sample: int, before: int, now: int) -> int:
    """Count the ages that a sampled row has reached since `before`. Its age now."""
    shift, group, used = state.book[_SHIFT], sample & 63, sample >> 24
    age = int64(state.age_of[min(((now - used) & (_EPOCH - 1)) >> shift, _LAST_AGE)])
    then = (before - used) & (_EPOCH - 1)
    since = int64(state.age_of[min(then >> shift, _LAST_AGE)]) if then < _EPOCH // 2 else int64(0)
    state.reached[group, since + 1] += _ONE
    state.reached[group, age + 1] -= _ONE
    return age


@lean
def learn(state: State, group: int, now: int) -> None:
    """Look through a part of the samples; then the index of a class at every age, from what was measured, which then fades."""
    size = state.samples.size
    for place in range((group * size + _CLASSES - 1) // _CLASSES, ((group + 1) * size + _CLASSES - 1) // _CLASSES):
        if state.samples[place] != 0:
            _follow(state, state.samples[place], state.seen[group], now)
    state.seen[group] = now
    if state.reached[group, 0] >= _ENOUGH * _ONE:
        _judge(state, group)
    elif group >= 2 * _INTERVALS or group & 3 == _GIVEN:  # too few to judge: as newcomers, or what one use less is worth
        like = group | _NONE if group & 3 == _GIVEN else group - _INTERVALS
        for age in range(_NUM_AGES):
            state.worth[group, age] = state.worth[like, age]
    for age in range(_NUM_AGES):
        state.returns[group, age] -= state.returns[group, age] >> _FADE
        state.reached[group, age] -= state.reached[group, age] >> _FADE


@lean
def _judge(state: State, group: int) -> None:
    """The index of a class at every age.

    From the last age to the first: the best time to give up is the end of a run of ages that together bring more than any
    shorter run and than what follows. An age is a run by itself, and takes in the run behind it for as long as that is better.
    What few have reached is guessed from the age before. Only sums, products and quotients of float64, which are the same on
    every machine.
    """
    uses, time, end = state.uses, state.time, state.end
    alive, at, share = 1.0, int64(0), 0.0
    for age in range(_NUM_AGES):
        at += state.reached[group, age]
        doubt = _DOUBT * _ONE if age > 0 else _ONE
        share = (min(state.returns[group, age], at) + doubt * share) / (at + doubt)
        used = alive * share
        alive -= used
        uses[age], time[age], end[age] = used, (alive + used / 2) * (1 << max((age >> 2) - 1, 0)), age + 1
    for age in range(_NUM_AGES - 1, -1, -1):
        behind = int64(end[age])
        while behind < _NUM_AGES and uses[behind] * time[age] > uses[age] * time[behind]:
            uses[age] += uses[behind]
            time[age] += time[behind]
            behind = int64(end[behind])
            end[age] = behind
        state.worth[group, age] = int64(min(uses[age] / time[age] * _SCALE, _SCALE)) if time[age] > 0 else int64(0)


def check(state: State, keys: npt.NDArray[np.int64]) -> None:
    """Each word is one that can have been written; nothing is in a slot that was not handed out."""
    used = int(state.book[_USED])
    assert (keys[used:] == EMPTY).all(), "a slot holds a key before it was handed out"
    assert (state.words[used:] <= _TURN << 6).all(), "a slot was used before it was handed out"
    assert ((state.words[:used] >> 2) & 15 > 0).all(), "a slot was handed out and never used"
    assert (state.ghosts[state.ghosts > 0] & 15 > 0).all(), "a row that left was never used"
    assert (state.returns >= 0).all(), "fewer uses than none were counted"
    assert (state.worth >= 0).all(), "an index is negative"
    assert 0 <= state.book[_HAND] < max(keys.size, 1), "the hand is outside the tier"
    assert state.book[_LESSON] - state.book[_CLOCK] <= state.book[_INTERVAL], "the next lesson is too late"


bind(State, on_hit=on_hit, on_miss=on_miss, ask=ask, ask_miss=ask_miss)
for _name, _function in (("worth_of", _index), ("least_of", _anything)):
    setattr(State, _name, staticmethod(_function))
POLICY = Policy("gittins", init, check, rank)
