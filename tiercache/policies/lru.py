"""LRU: the key that was used longest ago leaves first.

One ring in order of use. A hit moves its slot to the newest end, which is six stores at random places: the price of an
exact order. A pinned slot that comes up for eviction is in use, and so is moved to the newest end.

Exactly libCacheSim's LRU.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean
from tiercache.policies.base import EMPTY, MAX_PINNED_VICTIMS, Policy, bind
from tiercache.policies.links import members, new_rings, oldest_unpinned, push, renew


class State(NamedTuple):
    """links int32[capacity + 1, 2]: the ring; used int64[1]: slots handed out so far."""

    links: npt.NDArray[np.int32]
    used: npt.NDArray[np.int64]


def init(capacity: int) -> State:
    """State of `capacity` slots, 8 bytes a slot."""
    return State(new_rings(capacity, 1), np.zeros(1, np.int64))


@lean
def on_hit(state: State, keys: Any, slot: int) -> None:
    """Make the slot the newest."""
    renew(state.links, keys.size, slot)


@lean
def on_miss(state: State, keys: Any, pins: Any, key: int) -> int:
    """The slot used longest ago that has no pin."""
    slot = int64(state.used[0])
    if slot < keys.size:
        state.used[0] += 1
        push(state.links, keys.size, slot)
        return slot
    slot, _ = oldest_unpinned(state.links, keys.size, pins, MAX_PINNED_VICTIMS)
    if slot >= 0:
        renew(state.links, keys.size, slot)
    return slot


def check(state: State, keys: npt.NDArray[np.int64]) -> None:
    """Each slot handed out is in the ring once; the others are empty."""
    used = int(state.used[0])
    assert sorted(members(state.links, keys.size)) == list(range(used)), "the ring is not the slots handed out"
    assert (keys[used:] == EMPTY).all(), "a slot holds a key before it was handed out"


bind(State, on_hit=on_hit, on_miss=on_miss)
POLICY = Policy("lru", init, check)
